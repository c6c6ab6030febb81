"""The API server spoken to in plain JSON: what the tools here send and get are the objects as YAML shows them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError, MaxRetryError

from common.script import UserError

Json = dict[str, Any]
MERGE = "application/merge-patch+json"  # RFC 7396; lists are replaced
STRATEGIC = "application/strategic-merge-patch+json"  # lists with keys are merged; not for custom resources
TIMEOUT_S = 30
AS_JSON = {200: "object", 201: "object", 202: "object"}


def call(
    api: ApiClient,
    method: str,
    path: str,
    body: Json | None = None,
    *,
    query: Mapping[str, Any] | None = None,
    patch: str = MERGE,
) -> Json:
    """One request; the answer's JSON.

    Raises:
        ApiException: the server refuses; its `status` is the HTTP code, `reason_of` its words.
    """
    kind = patch if method == "PATCH" else "application/json"
    return api.call_api(  # type: ignore[no-any-return]
        path,
        method,
        query_params=list((query or {}).items()),
        header_params={"Accept": "application/json", "Content-Type": kind},
        body=body,
        response_types_map=AS_JSON,
        auth_settings=["BearerToken"],
        _return_http_data_only=True,
        _request_timeout=TIMEOUT_S,
    )


def get(api: ApiClient, path: str, **query: Any) -> Json:
    return call(api, "GET", path, query=query)


def find(api: ApiClient, path: str) -> Json | None:
    """The object there; None if there is none."""
    try:
        return get(api, path)
    except ApiException as error:
        if error.status == 404:
            return None
        raise


class Watch:
    """(ADDED | MODIFIED | DELETED | BOOKMARK | ERROR, object) as they come, until timeout_s or `stop` by a thread."""

    def __init__(self, api: ApiClient, path: str, version: str, timeout_s: int, **query: Any) -> None:
        query |= {
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": timeout_s,
            "allowWatchBookmarks": "true",
        }
        self._answer = api.call_api(
            path,
            "GET",
            query_params=list(query.items()),
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(TIMEOUT_S, timeout_s + TIMEOUT_S),
        )

    def __iter__(self) -> Iterator[tuple[str, Json]]:
        buffer = b""
        try:
            for chunk in self._answer.stream(None, decode_content=False):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    yield event["type"], event["object"]
        finally:
            self._answer.close()

    def stop(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # it has ended by itself
            self._answer.shutdown()


def reason_of(error: ApiException) -> str:
    """The server's own words, on one line."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.reason or "no reason given"
    return " ".join(str(said).split())


def as_user_error(error: ApiException | HTTPError, url: str) -> UserError:
    """What went wrong when the server at `url` was asked, and what to do about it."""
    if isinstance(error, ApiException) and error.status:
        said = reason_of(error)
        if error.status == 401 or "system:anonymous" in said:
            return UserError(f"{url} does not accept the credentials (expired, or another cluster's); log in anew")
        if error.status == 403:
            return UserError(f"{url} forbids it: {said}; ask for that right, or name a namespace that is yours")
        return UserError(f"{url} refuses ({error.status}): {said}; correct what it names")
    text = str(error.reason if isinstance(error, MaxRetryError | ApiException) and error.reason else error)
    if "CERTIFICATE_VERIFY" in text or "certificate verify" in text:
        return UserError(f"{url} shows a certificate that the kubeconfig does not trust; is it of another cluster?")
    why = "connection refused" if "refused" in text else "no such host" if "resolve" in text else "no answer"
    return UserError(f"no cluster answers at {url} ({why}); see whether it runs, and which --context is meant")
