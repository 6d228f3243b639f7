"""What a step of reinforcement and of baking costs with an adapter, by part, and what thoughts at one position cost.

    python tests/benchmarks/bench_adapter.py MODEL [--data FOLDER] [--problems 4] [--thoughts 8] [--length 24]
        [--rank 8] [--repeats 3] [--only reinforcement baking latency] [--recipe VARIANT]

``MODEL``: a run, or a name or folder as ``load_champion`` takes it. One thread, CPU seconds of the process (not wall
time), medians of repetitions after a warm-up. "before" is peft's own layers, a reference that reads the true tokens
after thoughts too and a gradient through all thoughts, "now" is ours. They take turns on the same problems and seed.
Reinforcement is that of the default settings, with likelihood and KLs, or of a ``--recipe``, as smollm2, which has
reward alone. Floors: two operations a weight and token over what a product of 1,000 rows reaches here, or the weights'
bytes once a pass over what a sum reaches.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from functools import partial, wraps

import torch
from peft.tuners.lora import Linear
from peft.tuners.trainable_tokens import TrainableTokensLayer

import qs_lib as qs
from qs_lib.data.problems import load_problems
from qs_lib.data.strategies import PROMPTS
from qs_lib.data.tokens import add_thinking_tokens
from qs_lib.errors import UpstreamError
from qs_lib.evaluation.latency import forward_with_thoughts
from qs_lib.model import QuietStarForCausalLM
from qs_lib.training import adapter, baking, loop, reinforce
from qs_lib.workbook.params import recipe

PARTS = {
    "sampling": (reinforce, "draw_rollouts"),
    "policy, reference and loss": (reinforce, "quiet_star_loss"),
    "of these the reference": (reinforce, "reference_kls"),
    "student, teacher and loss": (baking, "baking_loss"),
    "of these the teacher": (baking, "_teacher_logits"),
    "backward": (torch.Tensor, "backward"),
    "update": (reinforce.MuonGrokfast, "step"),
}
seconds = defaultdict(lambda: defaultdict(list))
OURS = {adapter.LoraLinear: Linear, adapter.TokenRows: TrainableTokensLayer}
RESCORE = reinforce.rescore_thoughts


def timed(name, function):
    @wraps(function)
    def call(*args, **options):
        started = time.process_time()
        try:
            return function(*args, **options)
        finally:
            seconds[name][turn].append(time.process_time() - started)

    return call


def take(model, name):
    """Let the model compute as it did ``before``, or as it does ``now``."""
    global turn
    turn, kinds = name, OURS if name == "before" else {old: new for new, old in OURS.items()}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    whole = lambda *args, after=True, **options: RESCORE(*args, **options)
    reinforce.rescore_thoughts = whole if name == "before" else RESCORE


def table(title, repeats, floor):
    print(f"\n{title}")
    for name, turns in seconds.items():
        before, now = (statistics.median(turns[t][-repeats:]) for t in ("before", "now"))
        print(f"  {name:28} before {before:7.2f} s   now {now:7.2f} s   {before / now:5.2f} times faster")
    print(f"  floor {floor:.2f} s", flush=True)
    seconds.clear()


def reinforcement(model, tokenizer, problems, given, flops):
    sizes = {"batch_size": given.problems, "num_thoughts": given.thoughts, "thought_length": given.length, "over": 1}
    rates = {"muon": False, "adamw_lr": 1e-9, "head_lr": 1e-9, "grokfast_lambda": 0.0, "lora_rank": given.rank}
    s = reinforce.QuietStarSettings(n_true=6, objective="signed")
    if given.recipe:
        s = s.among(recipe("05_rl", given.recipe), gradient_checkpointing=False)
    s = s.but(**sizes, **rates, use_curriculum=False)
    with loop.training(model.lm, tokenizer, s) as lm:
        reference, optimizer = reinforce.prepared(model, lm, tokenizer, s)
        scheduler, drawn = loop.scheduled(optimizer, 100), {}

        def step():
            rng, generator = random.Random(0), torch.Generator().manual_seed(0)
            rolled = drawn[turn] = reinforce.draw_rollouts(model, tokenizer, problems, 0, s, rng, generator)
            whole = s.but(thought_nll_weight=1e-30) if turn == "before" else s  # its gradient is that of all thoughts
            loss, _, (_, drawn["advantage"]) = reinforce.quiet_star_loss(
                model, reference, tokenizer, *rolled[1:], whole
            )
            loop.update(loss, optimizer, scheduler, {"model": model.parameters()}, "the loss")

        for name in ("before", "now") * (given.repeats + 1):
            take(lm, name)
            timed("the step", step)()
        thoughts, old = drawn["now"].thoughts, drawn["before"].thoughts
        kept, text = int(thoughts.lengths.sum()), int(drawn["now"].mask.sum())
        same = (thoughts.tokens == old.tokens).all(-1).float().mean().item()
        different = len(torch.cat([thoughts.tokens[k, 0].unique(dim=0) for k in range(len(thoughts.tokens))]))
        print(f"\n{text} text tokens, {kept} of thoughts, {different} different thoughts of {thoughts.lengths.numel()}")
        print(f"the same thoughts before and now: {same:.3f}")
        read = text + kept + 5 * thoughts.lengths.numel()
        tokens = (text + kept) + read + (text + kept) + read  # sampled, scored, by the reference, and back
        head = 4 * kept  # sampled, scored, by the reference, and back
        if given.recipe:  # no reference, and the way back through thoughts with an advantage alone
            used = drawn["advantage"] != 0
            print(f"thoughts with an advantage: {used.float().mean():.2f}")
            credited = int(thoughts.lengths[:, 0][used].sum())
            tokens = (text + kept) + read + 2 * (int(drawn["now"].mask[used.any(1)].sum()) + credited)
            head = 2 * kept + 2 * credited
        table("one step of reinforcement", given.repeats, (tokens * flops[0] + head * flops[1]) / flops[2])


def bake(model, tokenizer, problems, given, flops):
    s = baking.BakingSettings(muon=False, adamw_lr=1e-9, grokfast_lambda=0.0, lora_rank=given.rank)
    examples = list(qs.reasoning_dataset(problems[:100], [], 4 * given.problems, 0, 0)["train"])[: 4 * given.problems]
    told = baking.worked_replies(tokenizer, examples, PROMPTS)
    batch = [
        baking.thought_item(tokenizer, asked, e["question"], plain, True)
        for e, (asked, plain) in zip(examples, told, strict=True)
    ]
    baking.keep_states(model.lm, batch)
    with loop.training(model.lm, tokenizer, s) as lm:
        optimizer = baking._muon_grokfast(lm, s)
        scheduler = loop.scheduled(optimizer, 100)
        for name in ("before", "now") * (given.repeats + 1):
            take(lm, name)
            timed("the step", baking.baking_step)(lm, lm, tokenizer, batch, optimizer, scheduler, s)
        read, heads = sum(len(i.student_ids) for i in batch), sum(len(i.targets) for i in batch)
        print(f"\n{len(batch)} replies, {read} tokens, {heads} of them learnt")
        floor = (2 * read * flops[0] + 3 * heads * flops[1]) / flops[2]
        table("one step of baking, the teacher's states kept", given.repeats, floor)


def latency(model, given, size, speed):
    words = min(4000, model.lm.get_input_embeddings().weight.shape[0] - 8)
    ids = torch.randint(9, words, (1, 64), generator=torch.Generator().manual_seed(0))
    for length in (10, 20):
        times = []
        for _ in range(given.repeats + 2):
            started = time.process_time()
            forward_with_thoughts(model, ids, 1, 4, length)
            times.append(time.process_time() - started)
        floor = length * size / speed
        print(f"4 thoughts of {length} after 64 tokens {statistics.median(times[1:]):.2f} s   floor {floor:.2f} s")


def best(work, repeats=5):
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="pocket")
    for name, value in {"problems": 4, "thoughts": 8, "length": 24, "rank": 8, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", default=["reinforcement", "baking", "latency"])
    parser.add_argument("--recipe", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        model, tokenizer = qs.load_run(given.model)
    except UpstreamError:
        lm, tokenizer = add_thinking_tokens(*qs.load_champion(given.model))
        model = QuietStarForCausalLM.from_base(lm, tokenizer)
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    problems = list(load_problems(given.data, "train", 200, 0))
    end = model.lm.get_output_embeddings().weight
    body = sum(p.numel() for p in model.lm.parameters() if p.numel() != end.numel())
    x, w, long = torch.randn(1000, 576), torch.randn(1536, 576), torch.randn(25_000_000)
    rate, speed = 2 * 1000 * w.numel() / best(partial(torch.matmul, x, w.T)), 1e8 / best(long.sum)
    flops = 2 * body, 2 * end.numel(), rate
    print(
        f"{rate / 1e9:.0f} GFLOP/s, {speed / 1e9:.0f} GB/s, {body / 1e6:.0f}M weights and {end.numel() / 1e6:.0f}M rows"
    )
    if "latency" in given.only:
        latency(model, given, 4 * (body + end.numel()), speed)
    if "baking" in given.only:
        bake(model, tokenizer, problems, given, flops)
    if "reinforcement" in given.only:
        reinforcement(model, tokenizer, problems, given, flops)


if __name__ == "__main__":
    main()
