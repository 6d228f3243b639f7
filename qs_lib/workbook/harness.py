"""``python -m qs_lib.workbook.harness MODEL DATA``: a run's model in lm-evaluation-harness, offline.

The tasks are lm-eval's own kind of file, in ``tasks/``, on the problems that ``qs_lib.load_problems`` reads. Their
filters ``last_number`` and ``whole_reply`` read a reply as the rest of the library does. The model is lm-eval's
``HFLM`` with two differences. Text becomes ids as in training. A log-likelihood thinks before the tokens that are
scored only, where ``HFLM`` would think before every token of the prompt and of the padding.
"""

import os
import sys
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm

from ..champion import load_champion
from ..data.answers import last_number, whole_reply
from ..data.problems import load_problems
from ..data.tokens import encode_context, encode_reply, padded
from ..errors import SourceError, WorkbookError
from ..files import REPOSITORY, find_run, to_json, write_bytes
from ..model import QuietStarForCausalLM
from .run import exit_code, parsed

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.filter import Filter
    from lm_eval.api.registry import register_filter
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as missing:
    sentence = f"{missing.name or missing} is missing: install the harness with `pip install -e .[harness]`"
    if __name__ == "__main__":
        sys.exit(f"error: {sentence}")
    raise WorkbookError(sentence) from None
TASKS = ("gsm8k_generate", "gsm8k_likelihood")


class ThinkingLM(HFLM):
    """A loaded model in lm-evaluation-harness. A :class:`QuietStarForCausalLM` thinks if ``think`` is set.

    In replies it thinks every ``n_true`` tokens. The longest text is the model's own, less the length of a thought.
    """

    def __init__(self, model, tokenizer, think: bool = True, batch_size: int = 8, **options):
        wrapped = isinstance(model, QuietStarForCausalLM)
        self.thinks = think and wrapped
        if wrapped:
            model.config.think = self.thinks
        room = model.config.get_text_config().max_position_embeddings
        room -= model.config.thought_length if self.thinks else 0
        options |= {"batch_size": batch_size, "max_length": room, "backend": "causal"}
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if continuation.startswith(" "):
            return encode_context(self.tokenizer, context), encode_reply(self.tokenizer, continuation[1:])
        return encode_context(self.tokenizer, context), self.tokenizer.encode(continuation, add_special_tokens=False)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        rows = [encode_context(self.tokenizer, text)[-(left_truncate_len or 0) :] for text in strings]
        return padded(self.tokenizer, rows, side=padding_side)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """Return [(log-likelihood in nats, is greedy)] for requests (key, context ids, continuation ids)."""
        if not self.thinks:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers, size = [None] * len(requests), override_bs or self.batch_size
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in tqdm(range(0, len(order), size), desc="log-likelihood", disable=disable_tqdm, leave=False):
            chunk = order[start : start + size]
            texts = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in chunk]
            for i, answer in zip(chunk, self._scores(texts, [len(requests[i][2]) for i in chunk]), strict=True):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return answers

    def _scores(self, texts: list[list[int]], scored: list[int]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of the last ``scored[i]`` ids of each text, and whether each is the likeliest."""
        ids, mask = padded(self.tokenizer, [t[:-1] for t in texts], self.device, "left")
        back = torch.arange(max(scored), 0, -1)  # the last tokens of all rows stand below each other
        there = back <= torch.tensor(scored)[:, None]
        at = (ids.shape[1] - back).expand(len(texts), -1)
        thoughts = self.model.think(ids, mask, at.masked_fill(~there, -1).to(self.device)).hidden
        base = self.model.read(ids, mask)
        total, greedy = torch.zeros(len(texts)), torch.ones(len(texts), dtype=torch.bool)
        # one place at a time: a vocabulary for each of its thoughts is large enough
        for k, n in enumerate(back.tolist()):
            log_probs = self.model.mix(base[:, at[0, k]], thoughts[:, k])
            true = torch.tensor([t[-n] if len(t) >= n else 0 for t in texts], device=self.device)
            total += log_probs.gather(1, true[:, None]).squeeze(1).cpu().masked_fill(~there[:, k], 0)
            greedy &= (log_probs.argmax(-1) == true).cpu() | ~there[:, k]
        return list(zip(total.tolist(), greedy.tolist(), strict=True))


@register_filter("last_number")
class LastNumber(Filter):
    """Read the number of each reply, the last one of a sentence."""

    def apply(self, resps, docs):
        return [[last_number(reply) for reply in replies] for replies in resps]


@register_filter("whole_reply")
class WholeReply(Filter):
    """Read the first line of each reply as its answer, as ``accuracy.answer_of`` does."""

    def apply(self, resps, docs):
        return [[whole_reply(reply.partition("\n")[0]) for reply in replies] for replies in resps]


def task_of(name: str, data: str | Path) -> dict:
    """Return the task ``tasks/NAME.yaml``, or of a file elsewhere, on the problems that ``data`` holds.

    A document is a ``Problem``: its ``answer`` is the number alone. Raises ``SourceError`` if there is no such task
    file or no problems, ``WorkbookError`` for problems that cannot be read.
    """
    path = Path(name).expanduser() if name.endswith(".yaml") else REPOSITORY / "tasks" / f"{name}.yaml"
    if not path.is_file():
        raise SourceError(f"there is no task file {path}; known are {', '.join(TASKS)}")
    splits = {split: load_problems(data, split, distinct=False) for split in ("train", "test")}
    return yaml.safe_load(path.read_text(encoding="utf-8")) | {"custom_dataset": lambda **_: splits}


def run_harness(
    model, tokenizer, data, tasks=TASKS, think: bool = True, limit: int | None = None, batch_size=8, seed=0
) -> dict:
    """Return lm-eval's result dict for a loaded model on the problems in ``data``, the first ``limit`` of each task.

    Replies take at most half of the model's longest text. Raises ``SourceError``, see :func:`task_of`.
    """
    if limit is not None and limit < 1:
        raise WorkbookError(f"limit is {limit}; it must be at least 1, or None for all")
    lm, chosen = ThinkingLM(model, tokenizer, think, batch_size), [task_of(name, data) for name in tasks]
    for generation in (task.get("generation_kwargs", {}) for task in chosen):
        if "max_gen_toks" in generation:
            generation["max_gen_toks"] = min(generation["max_gen_toks"], lm.max_length // 2)
    torch.manual_seed(seed)
    settings = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    settings |= {"task_manager": TaskManager(include_defaults=False), "limit": limit, "bootstrap_iters": 100}
    return simple_evaluate(model=lm, tasks=chosen, **settings)


HARNESS_OPTIONS = {  # of the command line
    "model": {"help": "a run's name (its quietstar model is taken), a model folder or a Hugging Face name"},
    "data": {"help": "folder or file of problems in GSM8K's form"},
    "--tasks": {"nargs": "+", "default": TASKS, "help": "names in tasks/, or .yaml files"},
    "--no-thoughts": {"action": "store_true", "help": "the same model without thinking"},
    "--limit": {"type": int, "help": "only the first so many problems"},
    "--batch-size": {"type": int, "default": 8},
    "--seed": {"type": int, "default": 0},
    "--output": {"type": Path, "help": "also write the results to this JSON file"},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    about = "lm-evaluation-harness on local problems."
    given = parsed("python -m qs_lib.workbook.harness", about, HARNESS_OPTIONS, arguments)

    def work():
        source = given.model
        if "/" not in source and not Path(source).is_dir():
            source = str(find_run("" if source == "pocket" else source) / "quietstar")
        settings = given.tasks, not given.no_thoughts, given.limit, given.batch_size, given.seed
        found = run_harness(*load_champion(source), given.data, *settings)
        print(make_table(found))
        if given.output:
            results = {name: found[name] for name in ("results", "n-samples")}
            write_bytes(given.output, to_json(results, 1).encode() + b"\n")
        return 0

    return exit_code(work, "the same command starts again")


if __name__ == "__main__":
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # the problems are local
    sys.exit(main())
