"""Quiet-STaR workbook: teach a language model to think before it speaks, and find out whether the thinking helps."""

import os

# Read when torch is loaded. Threads that wait for one whose core another program has soon sleep in place of spinning.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .champion import load_champion
from .data.batches import difficult_positions, thought_length
from .data.problems import load_problems
from .data.strategies import STRATEGIES, reasoning_dataset
from .data.tokens import THINKING_TOKENS, add_thinking_tokens
from .evaluation.coherence import Coherence, coherence
from .evaluation.episodes import Episode, read_episodes
from .evaluation.latency import LatencyReport, measure_latency
from .evaluation.theater import TheaterReport, anti_theater
from .model import MixingHead, QuietStarConfig, QuietStarForCausalLM
from .thoughts.generate import Thoughts, generate_thoughts
from .thoughts.rescore import Rescored, rescore_thoughts
from .training.baking import BakingResult, bake
from .training.difference import load_run
from .training.imitation import learn_prompts
from .training.optim import MuonGrokfast
from .training.reinforce import TrainingResult, train_quiet_star
from .training.settings import BakingSettings, QuietStarSettings


def __getattr__(name):
    """``ThoughtInspector``, when it is first asked for: its widgets are an optional extra."""
    if name != "ThoughtInspector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .viewing.inspector import ThoughtInspector
    except ModuleNotFoundError as error:
        if error.name != "ipywidgets":
            raise
        raise ImportError("the inspector needs ipywidgets: pip install 'quiet-star-workbook[notebooks]'") from None
    return ThoughtInspector
