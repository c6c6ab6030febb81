"""A program in SGLang's frontend language, run by frontend.py with the Python of SGLang's own environment.

python branching.py URL BRANCHES TOKENS PREFIX_WORDS prints a line of JSON: what each generation read and found cached.
"""

import json
import sys

import sglang as sgl

QUESTIONS = ("its purpose", "its cost", "its history", "its risks", "its rivals", "its users", "its name", "its end")


@sgl.function
def review(s, subject: str, branches: int, tokens: int):
    """One introduction; a branch for each question, at the same time; a verdict that has read them all."""
    s += subject
    s += "\nIn short: "
    s["asked"] = s.text()
    s += sgl.gen("short", max_tokens=tokens, ignore_eos=True)
    forks = s.fork(branches)
    for fork, question in zip(forks, QUESTIONS, strict=False):
        fork += f"\nOn {question}: " + sgl.gen("part", max_tokens=tokens, ignore_eos=True)
    forks.join()
    for question, fork in zip(QUESTIONS, forks, strict=False):
        s += f"\nOn {question}: " + fork["part"]
    s += "\nVerdict: " + sgl.gen("verdict", max_tokens=tokens, ignore_eos=True)
    s["metas"] = [fork.get_meta_info("part") for fork in forks]
    s["branches"] = [fork.text() for fork in forks]


def main() -> None:
    url, branches, tokens, words = sys.argv[1], *map(int, sys.argv[2:5])
    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    subject = "The text to be reviewed. " + " ".join(f"word{number}" for number in range(words))
    state = review.run(subject=subject, branches=branches, tokens=tokens, temperature=0)
    metas = [state.get_meta_info("short"), *state["metas"], state.get_meta_info("verdict")]
    rows = [{key: meta[key] for key in ("prompt_tokens", "cached_tokens", "completion_tokens")} for meta in metas]
    print("READ " + json.dumps({"generations": rows, "asked": state["asked"], "branches": state["branches"]}))


main()  # no exercise, and only SGLang's Python can import it
