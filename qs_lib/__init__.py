"""Quiet-STaR workbook: teach a language model to think before it speaks, and find out whether the thinking helps."""

from .baking import BakingResult
from .baking import bake
from .champion import load_champion
from .coherence import Coherence
from .coherence import coherence
from .episode import Episode
from .episode import read_episodes
from .latency import LatencyReport
from .latency import measure_latency
from .mixing import MixingHead
from .model import QuietStarConfig
from .model import QuietStarForCausalLM
from .optim import MuonGrokfast
from .positions import difficult_positions
from .positions import thought_length
from .problems import load_problems
from .reinforce import TrainingResult
from .reinforce import train_quiet_star
from .thoughts.rescore import Rescored
from .thoughts.rescore import rescore_thoughts
from .strategies import STRATEGIES
from .strategies import reasoning_dataset
from .theater import TheaterReport
from .theater import anti_theater
from .thoughts.generate import Thoughts
from .thoughts.generate import generate_thoughts
from .tokens import THINKING_TOKENS
from .tokens import add_thinking_tokens

__all__ = [
    "STRATEGIES", "THINKING_TOKENS", "BakingResult", "Coherence", "Episode", "LatencyReport", "MixingHead",
    "MuonGrokfast", "QuietStarConfig", "QuietStarForCausalLM", "Rescored", "TheaterReport", "Thoughts",
    "TrainingResult", "add_thinking_tokens", "anti_theater", "bake", "coherence", "difficult_positions", "generate_thoughts", "load_champion",
    "load_problems", "measure_latency", "read_episodes", "reasoning_dataset", "rescore_thoughts", "thought_length",
    "train_quiet_star",
]  # fmt: skip


def __getattr__(name):
    """``ThoughtInspector``, when it is first asked for: its widgets are an optional extra."""
    if name != "ThoughtInspector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .inspector import ThoughtInspector
    except ModuleNotFoundError as error:
        if error.name != "ipywidgets":
            raise
        raise ImportError("the inspector needs ipywidgets: pip install 'quiet-star-workbook[notebooks]'") from None
    return ThoughtInspector
