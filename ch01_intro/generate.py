"""Let a trained model write: load a Hugging Face folder and continue a prompt.

You learn   that training left an ordinary model folder behind, which any engine of the later chapters can serve
Laptop      python ch01_intro/generate.py --model runs/nano/model --prompt "class Parser:"
GPU node    the same command; a hub id works too where there is a network: --model HuggingFaceTB/SmolLM2-135M
Cluster     one device is enough
You see     text in the shape of the training corpus, and tokens/s of a plain loop: chapter 6 makes this fast
"""

from __future__ import annotations

import time

import torch

from common import dist, lm, script


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a hub id")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--max-new-tokens", type=script.at_least(1), default=120)
    parser.add_argument("--temperature", type=script.positive, default=0.7)
    parser.add_argument("--top-k", type=script.at_least(1), default=50)
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise script.UserError("the prompt is empty; give the model at least one character to continue")
    script.start(__file__, args)
    with dist.session(args.device) as ctx:
        tokenizer = lm.load_tokenizer(args.model)
        model = lm.load(args.model, ctx.device).eval()
        ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(ctx.device)
        room = model.config.max_position_embeddings - ids.shape[1]
        if args.max_new_tokens > room:
            raise script.UserError(f"the model has room for {room} tokens after this prompt; lower --max-new-tokens")
        script.seed_everything(args.seed)
        choice = {} if args.greedy else {"temperature": args.temperature, "top_k": args.top_k}
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, do_sample=not args.greedy,
            pad_token_id=0, **choice,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        new = out.shape[1] - ids.shape[1]
        text = tokenizer.decode(out[0])
        if ctx.is_main:
            print(text, flush=True)
        return {"prompt_tokens": ids.shape[1], "new_tokens": new, "tokens_per_s": new / seconds, "text": text}


if __name__ == "__main__":
    script.run(main)
