"""Talk about a long text over several turns with a kept cache: time to first token and speed, dense beside sparse.

    python examples/chat_with_a_book.py [--model FOLDER_OR_ID --gates FOLDER_OR_ID]

The embedded model is no chat model, but finds what it is asked for. Turn 1 reads the text, turn 2 only asks (a short
chunk on the cache), turn 3 adds a chapter: all read blocks of what went before. Times on a CPU are worth something only
while nothing else is busy.
"""

import argparse
import contextlib
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

import seerattention as seer

LENGTH, DENSITY = 8192, 0.1
FACT, QUESTION = "\nThe passcode of the {} is {}.\n", "\nQuestion: What is the passcode of the {}? Answer:"
CODES = {"golden anchor": 503626, "odd tree": 912755, "rapid cousin": 649415}


class Clock(BaseStreamer):
    """Notes when the prompt was handed over and when each token came."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self): ...


def make_turns(tokenizer):
    """Token ids of three turns, with a passcode somewhere in each text."""
    book = tokenizer(seer.testbed.book_texts("test")[0], add_special_tokens=False).input_ids
    parts = [book[: LENGTH // 3], book[LENGTH // 3 : LENGTH], book[LENGTH : LENGTH + LENGTH // 3]]
    facts = [tokenizer(FACT.format(*code), add_special_tokens=False).input_ids for code in CODES.items()]
    asked = [tokenizer(QUESTION.format(name), add_special_tokens=False).input_ids for name in CODES]
    first = facts[0] + parts[0] + facts[1] + parts[1]
    return [first + asked[0], asked[1], facts[2] + parts[2] + asked[2]]


def answer(model, tokenizer, ids, cache):
    """All tokens so far, and what is to be said about this turn."""
    clock, known = Clock(), cache.get_seq_length()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock, max_new_tokens=12,
        do_sample=False, stop_strings=["\n"], tokenizer=tokenizer,
    )  # fmt: skip
    first, decoding = clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
    speed = (len(clock.times) - 2) / decoding if decoding else float("nan")
    text = tokenizer.decode(output[0, ids.shape[1] :]).strip()
    return output, f"{ids.shape[1] - known} new tokens, first after {first:.2f} s, then {speed:.0f} tokens/s: {text!r}"


def main(name: str | None = None, gates=None) -> None:
    if name is None:
        (model, tokenizer), gates = seer.testbed.load(), seer.testbed.gates_path()
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto").eval()
    seer.attach(model, gates, prefill=seer.TopK(DENSITY))
    for way in ("dense", "sparse"):
        cache, ids = DynamicCache(), torch.empty(1, 0, dtype=torch.int64, device=model.device)
        for number, turn in enumerate(make_turns(tokenizer), 1):
            ids = torch.cat([ids, torch.tensor([turn], device=model.device)], dim=1)
            with seer.dense(model) if way == "dense" else contextlib.nullcontext(), seer.record(model) as stats:
                ids, said = answer(model, tokenizer, ids, cache)
            print(f"{way}, turn {number}: density {stats.prompt_density:.2f}, {said}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model folder or hub id; it needs --gates")
    parser.add_argument("--gates", help="its trained gates, see `seer distill`")
    main(*vars(parser.parse_args()).values())
