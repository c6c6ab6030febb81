/* An inference engine that answers at once: what stands behind a router when the router alone is measured.
 *
 *     cc -O2 -o fake_engine fake_engine.c && ./fake_engine 8001 8002
 *
 * One thread, epoll, HTTP/1.1 with keep-alive. Every request, whatever it asks, gets the same 200: an OpenAI completion.
 * Requests are taken to be well formed, with a Content-Length or no body.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ROOM = 1 << 16, LISTENS = 1 };
struct peer { int fd, listens; size_t used; char *data; };

static const char BODY[] =
    "{\"id\":\"cmpl-0\",\"object\":\"text_completion\",\"created\":0,\"model\":\"fake\",\"choices\":[{\"index\":0,"
    "\"text\":\" one two three\",\"logprobs\":null,\"finish_reason\":\"length\"}],"
    "\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":3,\"total_tokens\":11}}";
static char answer[1024];
static size_t answer_length;

static struct peer *watch(int epoll, int fd, int listens) {
    struct peer *peer = calloc(1, sizeof *peer);
    peer->fd = fd;
    peer->listens = listens;
    if (!listens) peer->data = malloc(ROOM);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    return peer;
}

static void drop(struct peer *peer) {
    close(peer->fd);
    free(peer->data);
    free(peer);
}

/* Bytes of the first request in the buffer, 0 if it is not whole yet. */
static size_t request(char *data, size_t used) {
    char *end = memmem(data, used, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head = end + 4 - data, body = 0;
    for (char *line = data; line && line < end; line = memmem(line, end - line, "\r\n", 2)) {
        if (line[0] == '\r') line += 2;
        if (!strncasecmp(line, "content-length:", 15)) body = strtoul(line + 15, NULL, 10);
    }
    return used >= head + body ? head + body : 0;
}

static int serve(struct peer *peer) {
    ssize_t got = read(peer->fd, peer->data + peer->used, ROOM - peer->used);
    if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR);
    peer->used += got;
    size_t length;
    while ((length = request(peer->data, peer->used))) {
        if (write(peer->fd, answer, answer_length) != (ssize_t)answer_length) return 0;
        peer->used -= length;
        memmove(peer->data, peer->data + length, peer->used);
    }
    return peer->used < ROOM;
}

int main(int count, char **ports) {
    int epoll = epoll_create1(0), one = 1;
    answer_length = snprintf(answer, sizeof answer,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", sizeof BODY - 1, BODY);
    for (int i = 1; i < count; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        struct sockaddr_in at = {AF_INET, htons(atoi(ports[i])), {htonl(INADDR_LOOPBACK)}, {0}};
        if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 1024)) {
            fprintf(stderr, "error: port %s cannot be taken (%s)\n", ports[i], strerror(errno));
            return 2;
        }
        watch(epoll, fd, LISTENS);
    }
    puts("ready");
    fflush(stdout);
    for (struct epoll_event events[64];;) {
        int ready = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            struct peer *peer = events[i].data.ptr;
            if (peer->listens) {
                int fd = accept4(peer->fd, NULL, NULL, SOCK_CLOEXEC);
                if (fd < 0) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                watch(epoll, fd, 0);
            } else if (!serve(peer)) {
                drop(peer);
            }
        }
    }
}
