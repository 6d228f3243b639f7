"""Is the Hugging Face hub there? Asked before anything is loaded from it: a silent one would hang for minutes."""

import urllib.error
import urllib.request

from huggingface_hub import constants

PATIENCE = 3.0  # seconds


def hub_answers() -> bool:
    """Whether the hub may be used (``HF_HUB_OFFLINE`` is not set) and answers within ``PATIENCE`` seconds at all."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only that it does not like the question
    except (OSError, ValueError):
        return False
    return True
