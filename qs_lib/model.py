"""Quiet-STaR around any Hugging Face causal LM: a configuration, and a forward pass that thinks."""

import difflib

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .data.tokens import thinking_ids
from .errors import ParameterError, WorkbookError, at_least
from .mixing import GainHead, MixingHead, ZeroLinear, mix_hidden, mix_log_probs
from .settings import unknown_name
from .thoughts.attention import LanguageHead, backbone
from .thoughts.fallback import check_room, masked_states, new_cache, padded_states
from .thoughts.generate import generate_thoughts
from .thoughts.rescore import target_scores

_STATES = ("output_hidden_states", "output_attentions")
THINKING_SETTINGS = ("think", "num_thoughts", "thought_length", "thought_temperature", "n_true", "mixing", "gate")
_NEVER = -30.0  # the log-prob of a thinking token as text, where a finite number is needed


class QuietStarConfig(PreTrainedConfig):
    """Say how a model thinks. ``text_config`` is the wrapped language model's own configuration.

    ``think``: whether thoughts are on by default. At a position ``num_thoughts`` are drawn, at ``thought_temperature``
    (0: greedy) and of at most ``thought_length`` tokens, both tags counted. Each helps to predict ``n_true`` tokens.
    ``mixing``: ``"log_probs"`` (the mean of the predicted probabilities) or ``"hidden"`` (of the hidden states before
    the output head). ``gate``: what opens it, the ``"thoughts"`` or the ``"place"`` (:class:`qs_lib.mixing.MixingHead`).
    ``hidden_ids``: tokens never written as text (the thinking tokens). Raises ``WorkbookError`` for another ``mixing``.
    """

    model_type = "quietstar"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}
    text_config: dict | PreTrainedConfig | None = None
    think: bool = True
    num_thoughts: int = 4
    thought_length: int = 28
    thought_temperature: float = 1.0
    n_true: int = 4
    mixing: str = "log_probs"
    gate: str = "thoughts"
    hidden_ids: list[int] | None = None
    think_token_id: int | None = None
    end_think_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        _check_names(kwargs)
        super().__post_init__(**kwargs)
        if self.mixing not in ("log_probs", "hidden"):
            raise WorkbookError(f"mixing is {self.mixing!r}; it must be 'log_probs' or 'hidden'")
        at_least(1, num_thoughts=self.num_thoughts, n_true=self.n_true)
        at_least(2, thought_length=self.thought_length)
        at_least(0, thought_temperature=self.thought_temperature)
        text = self.text_config
        if isinstance(text, PreTrainedConfig):
            self.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(self, name, None) is None:
                    setattr(self, name, getattr(text, name, None))

    @property
    def vocab_size(self):
        return self.text_config.vocab_size

    @property
    def hidden_size(self):
        return self.text_config.hidden_size


class QuietStarForCausalLM(PreTrainedModel, GenerationMixin):
    """Think before predicting. ``lm`` is the wrapped language model, ``mixing_head`` weighs thoughts (``gain_head``: guesses).

    ``forward`` returns next-token logits. With ``think=False`` they are the wrapped model's. Else they are, at each
    position kept by ``logits_to_keep`` (all if 0), log-probs mixed from ``num_thoughts`` thoughts drawn there and the
    plain prediction. In cached generation thoughts are drawn after the prompt and again every ``n_true`` tokens. Their
    streams follow the written text in between. With ``return_dict_in_generate=True`` they come back beside the text, as
    ``out.past_key_values.thoughts`` (see :class:`ThinkingCache`). Without a cache the model thinks before every token.
    Sampling draws from torch's global generator.
    """

    config_class = QuietStarConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {}
    _keep_in_fp32_modules_strict = ["mixing_head", "gain_head"]
    _keys_to_ignore_on_load_missing = [r"gain_head\."]  # models of before had none: at zero it expects no gain

    def __init__(self, config: QuietStarConfig, lm=None):
        super().__init__(config)
        self.lm = lm if lm is not None else AutoModelForCausalLM.from_config(config.text_config)
        self.mixing_head = MixingHead(LanguageHead(self.lm).width, gate=config.gate)
        self.gain_head = GainHead(LanguageHead(self.lm).width)
        self.post_init()

    @classmethod
    def from_base(cls, lm, tokenizer=None, **settings) -> "QuietStarForCausalLM":
        """Wrap a loaded model that has its thinking tokens. Its weights are shared, not copied.

        Raises ``WorkbookError`` if it has no thinking tokens, or an adapter, which could not be saved inside.
        """
        if unknown := set(settings) - set(THINKING_SETTINGS):
            raise ParameterError(unknown_name(min(unknown), THINKING_SETTINGS))
        if isinstance(lm, cls):
            raise WorkbookError("this model thinks already: wrap the language model inside it, model.lm")
        if hasattr(lm, "get_base_model") or any(hasattr(module, "base_layer") for module in lm.modules()):
            advice = "merge it first (merge_and_unload), or wrap the model without it and put the adapter around both"
            raise WorkbookError(f"a model with an adapter cannot be wrapped: {advice}")
        tags = [getattr(lm.config, name, None) for name in ("think_token_id", "end_think_token_id")]
        if tags[0] is None:
            raise WorkbookError("the model has no thinking tokens: call add_thinking_tokens(model, tokenizer) first")
        for module in lm.modules():
            module._is_hf_initialized = True  # post_init must leave the loaded weights alone
        lm.config._name_or_path = ""  # nested configurations keep it: the saved model would tell its maker's folders
        config = QuietStarConfig(
            text_config=lm.config,
            attn_implementation=lm.config._attn_implementation,
            think_token_id=tags[0],
            end_think_token_id=tags[1],
            hidden_ids=tags if tokenizer is None else thinking_ids(tokenizer),
            **settings,
        )
        model = cls(config, lm=lm)
        model.mixing_head.to(lm.device), model.gain_head.to(lm.device)
        return model.eval()

    @property
    def generation_config(self):
        """The wrapped model's own: it generates by it without thoughts, and it is saved with the wrapper."""
        return self.lm.generation_config

    @generation_config.setter
    def generation_config(self, value):
        if "lm" in self._modules:  # not yet while it is being built
            self.lm.generation_config = value

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.lm.set_output_embeddings(value)

    def generate(self, inputs=None, generation_config=None, *more, think=None, **kwargs):
        """Write text as ``GenerationMixin.generate`` does, with ``think=False`` by the wrapped model alone.

        Raises ``WorkbookError`` while thinking for ways that call a model beside the text.
        """
        if not (self.config.think if think is None else think):
            _refuse_thoughts(kwargs.get("past_key_values"))
            return self.lm.generate(inputs, generation_config, *more, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask.any(1).all():
            raise WorkbookError("a prompt is padding only, which leaves nothing to think about: leave its row out")
        beside = ("guidance_scale", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        _refuse(beside, kwargs, generation_config or self.generation_config)
        return super().generate(inputs, generation_config, *more, think=True, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        logits_to_keep=0,
        think=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        """Return next-token logits (batch, kept, vocab), and with ``labels`` (batch, length) the loss of those kept.

        ``kwargs`` go to the wrapped model, or to the loss (``num_items_in_batch``, ``shift_labels``). Raises
        ``WorkbookError`` for what thinking does not know.
        """
        _check_names(kwargs)
        think = self.config.think if think is None else think
        whole = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if whole else logits_to_keep
        if labels is not None and (think or not whole or logits_to_keep):
            following = kwargs.pop("shift_labels", None)
            following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] if following is None else following
            kwargs["shift_labels"] = following[:, kept].contiguous()
        if not think:
            _refuse_thoughts(past_key_values)
            text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            wanted = {"logits_to_keep": logits_to_keep, "labels": labels, "use_cache": use_cache}
            wanted |= {name: True for name in _STATES if getattr(self.config, name, False)} | kwargs
            return self.lm(**text, past_key_values=past_key_values, **wanted)
        _refuse(("inputs_embeds", *_STATES), kwargs, self.config)
        padding = past_key_values is not None and attention_mask is not None and not attention_mask.any()
        if input_ids is None or not input_ids.numel() or padding:
            raise WorkbookError("there is no text to think about: input_ids are missing, empty or all padding")
        if past_key_values is not None:
            if not whole or logits_to_keep > 1:  # assisted generation asks for several tokens' predictions at once
                raise _unknown("a draft")
            return self._write(input_ids, attention_mask, past_key_values)
        at_least(1, tokens=input_ids.shape[1])
        _check_places(input_ids, attention_mask, position_ids)
        cache = self._write(input_ids, attention_mask, DynamicCache()).past_key_values if use_cache else None
        logits = self._predict(input_ids, attention_mask, kept)
        return CausalLMOutputWithPast(*self._loss(logits, labels, **kwargs), past_key_values=cache)

    def _predict(self, input_ids, attention_mask, kept):
        """Return the mixture's log-probs (batch, kept, vocab) from thoughts drawn at the positions ``kept``."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:  # padding does not think
            positions = positions.masked_fill(attention_mask == 0, -1)
        thoughts = self.think(input_ids, attention_mask, positions[:, kept])
        return self.mix(self.read(input_ids, attention_mask)[:, kept], thoughts.hidden)

    def _loss(self, logits, labels, shift_labels=None, num_items_in_batch=None, **kwargs):
        """Return the loss, or None without labels, and the logits."""
        hidden = torch.tensor(self.config.hidden_ids, device=logits.device)
        if labels is None:
            # to smooth labels a Trainer, which keeps them, sums the log-probs of all tokens: none may be -inf
            return None, logits if num_items_in_batch is None else logits.index_fill(-1, hidden, _NEVER)
        if torch.isin(shift_labels, hidden).any():
            raise WorkbookError("labels hold thinking tokens, which thinking never predicts: set them to -100")
        counted = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return self.loss_function(logits, labels, logits.shape[-1], **counted, **kwargs), logits

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *sizes):
        given = model_kwargs.get("past_key_values")
        if generation_config.use_cache is not False and (given is None or not given.get_seq_length()):
            model_kwargs["past_key_values"] = DynamicCache()  # whatever kind was asked for: thinking fills its own

    def think(self, input_ids, attention_mask=None, positions=None, generator=None, **settings):
        """Draw thoughts at ``positions`` (batch, P), with this configuration's settings unless given.

        ``settings`` go to ``qs_lib.generate_thoughts``, which also raises what does not fit.
        """
        c = self.config
        budget = {"num_thoughts": c.num_thoughts, "thought_length": c.thought_length}
        settings = budget | {"temperature": c.thought_temperature, "generator": generator} | settings
        tags = {"think_id": c.think_token_id, "end_id": c.end_think_token_id}
        return generate_thoughts(self.lm, input_ids, attention_mask, positions, **tags, **settings)

    def read(self, input_ids, attention_mask=None, cache=None) -> torch.Tensor:
        """Return the wrapped model's last hidden states (batch, new tokens, hidden). Fills ``cache``.

        Raises ``WorkbookError`` if the model has too few positions, or cannot go on from this kind of cache.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_room(self.lm, int(mask.sum(1).max()))
        base = backbone(self.lm)
        exact = new_cache(self.lm)
        if cache is None and exact is None:
            return padded_states(base, input_ids, mask)
        if cache is not None and (exact is None or len(exact.layers) > len(cache.layers)):
            name = type(self.lm).__name__
            raise WorkbookError(f"{name} cannot read on from a {type(cache).__name__}() exactly: use a ThinkingCache")
        return masked_states(base, input_ids, attention_mask, cache)

    def branch_weights(self, base, thought, weights: str = "head") -> torch.Tensor:
        """Return weights (..., 1 + K) from hidden states base (..., hidden) and thought (..., K, hidden).

        ``weights``: ``"head"`` (the mixing head's), ``"thoughts"`` (every thought alike, no vote for the plain
        prediction) or ``"none"`` (the plain prediction alone).
        """
        if weights == "head":
            return self.mixing_head(base, thought)
        k = thought.shape[-2]
        fixed = {"thoughts": [0.0] + k * [1 / k], "none": [1.0] + k * [0.0]}[weights]
        return torch.tensor(fixed, device=base.device).expand(*base.shape[:-1], -1)

    def mixing_weights(self, scored, weights: str = "head") -> torch.Tensor:
        """Return :meth:`branch_weights` (batch, P, n_true, 1 + K) at the true tokens of a ``qs_lib.Rescored``."""
        return self.branch_weights(scored.base_hidden, scored.thought_hidden.transpose(2, 3), weights)

    def mix(self, base, thought, weights=None, among=None, sharpening=None) -> torch.Tensor:
        """Return mixed log-probs (..., vocab) from last hidden states base (..., hidden) and thought (..., K, hidden).

        ``weights`` (..., 1 + K) replace the head's. ``among`` and ``sharpening``: see :meth:`visible_log_probs`.
        """
        weights = self.branch_weights(base, thought) if weights is None else weights
        if self.config.mixing == "hidden":
            return self.visible_log_probs(mix_hidden(weights, base, thought), among, sharpening)
        branches = (self.visible_log_probs(states, among, sharpening) for states in (base, thought))
        return mix_log_probs(weights, *branches)

    def mix_truth(self, scored, weights=None) -> torch.Tensor:
        """Return the mixture's log-probs (batch, P, n_true) of the true tokens, 0 where there is none. Differentiable.

        ``scored``: a ``qs_lib.Rescored`` whose pass forbade ``config.hidden_ids`` as text. ``weights`` (batch, P,
        n_true, 1 + K) replace the head's.
        """
        weights = self.mixing_weights(scored) if weights is None else weights
        if self.config.mixing == "hidden":
            states = mix_hidden(weights, scored.base_hidden, scored.thought_hidden.transpose(2, 3)).flatten(0, 2)
            forbid = torch.tensor(self.config.hidden_ids, device=states.device)
            mixed, _ = target_scores(LanguageHead(self.lm), states, scored.true.flatten(), forbid=forbid)
            mixed = mixed.view(scored.true.shape)
        else:
            mixed = mix_log_probs(weights, scored.base_logprobs, scored.true_logprobs.transpose(2, 3))
        return mixed.masked_fill(~scored.valid, 0)

    def visible_log_probs(self, hidden: torch.Tensor, among=None, sharpening=None) -> torch.Tensor:
        """Return log-probs (..., vocab) without the thinking tokens, from last hidden states (..., hidden).

        With ``among`` (M,), token ids: of these tokens only, (..., M). With ``sharpening`` (S,) logits are divided by
        each of these first: (..., S, vocab).
        """
        logits = LanguageHead(self.lm)(hidden)
        if among is None:
            logits[..., self.config.hidden_ids] = -torch.inf
        else:
            logits = logits[..., among]
        if sharpening is not None:
            logits = logits.unsqueeze(-2) / sharpening.unsqueeze(-1)
        return logits.log_softmax(-1)

    def _write(self, input_ids, attention_mask, cache):
        """Take one step of cached generation: read the new tokens in all streams, think where it is time, mix."""
        state = cache if isinstance(cache, ThinkingCache) else ThinkingCache(input_ids, attention_mask)
        if state is not cache and cache.get_seq_length():
            raise _unknown(f"a {type(cache).__name__} that it did not fill")
        if state.started:
            state.append(input_ids, attention_mask)
        if not state.started or state.age >= self.config.n_true or input_ids.shape[1] > 1:  # more than a token written
            last = torch.full((len(state.ids), 1), state.ids.shape[1] - 1, device=state.ids.device)
            last = last.masked_fill(state.mask[:, -1:] == 0, -1)  # a piece of the prompt may be all padding
            thoughts = self.think(state.ids, state.mask, last)
            state.thoughts.append(thoughts)
            state.restart(thoughts.tokens[:, 0], thoughts.lengths[:, 0], self.config.pad_token_id)
        return CausalLMOutputWithPast(logits=self.mix(*state.read(self)).unsqueeze(1), past_key_values=state)


class ThinkingCache(DynamicCache):
    """Hold what generation knows: the visible text, and a stream per row for "no thought" and each different thought.

    ``streams`` is their cache, or None if the family has no exact one: then they are read anew for every token.
    ``branches`` (rows, 1 + K): the stream that each reads. Thoughts that are alike share one. ``thoughts`` keeps every
    ``qs_lib.Thoughts`` drawn, in order, to be read beside the text: rows are those of ``ids``, in beam search too.
    """

    def __init__(self, input_ids, attention_mask=None):
        super().__init__()
        self.ids = input_ids
        self.mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.stream_ids, self.streams, self.age, self.thoughts = None, None, 0, []

    @property
    def started(self) -> bool:
        return self.stream_ids is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.ids.shape[1] if self.started else 0

    def append(self, ids, mask=None):
        """Add visible tokens (rows, n) to every stream. ``mask`` (rows, all) is the whole text's, where it is known."""
        self.ids = torch.cat([self.ids, ids], 1)
        whole = mask is not None and mask.shape == self.ids.shape
        self.mask = mask if whole else torch.cat([self.mask, torch.ones_like(ids)], 1)
        new = ids[self.stream_row]
        self.stream_ids = torch.cat([self.stream_ids, new], 1) if self.streams is None else new
        self.stream_mask = torch.cat([self.stream_mask, torch.ones_like(new)], 1)

    def restart(self, tokens, lengths, pad_id, plain: bool = True):
        """Begin streams, right-aligned: the text with each thought (rows, K, T), and alone, or with the first if not ``plain``."""
        numbers, branches = {}, []
        for row, (thoughts, ends) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            given = [tuple(t[:n]) for t, n in zip(thoughts, ends, strict=True)]
            for thought in [() if plain else given[0], *given]:
                branches.append(numbers.setdefault((row, thought), len(numbers)))
        self.branches = torch.tensor(branches, device=self.ids.device).view(len(tokens), -1)
        self.stream_row = torch.tensor([row for row, _ in numbers], device=self.ids.device)
        rows = [torch.cat([self.ids[row, self.mask[row] != 0], self.ids.new_tensor(t)]) for row, t in numbers]
        self.stream_ids = pad_sequence(rows, True, pad_id or 0, "left")
        self.stream_mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        self.streams, self.age = None, 0

    def read(self, model):
        """Read the new tokens of all streams. Return last hidden states (rows, hidden) and (rows, K, hidden)."""
        if self.age == 0:
            self.streams = new_cache(model.lm)
        self.age += 1
        hidden = model.read(self.stream_ids, self.stream_mask, cache=self.streams)[:, -1][self.branches]
        return hidden[:, 0], hidden[:, 1:]

    def reorder_cache(self, beam_idx):
        """Keep these rows, as beam search asks. The streams of a row go with it."""
        self.ids, self.mask = self.ids[beam_idx], self.mask[beam_idx]
        self.thoughts = [drawn.part(beam_idx) for drawn in self.thoughts]
        kept = self.branches[beam_idx]
        self.stream_row = torch.arange(len(kept), device=kept.device).repeat_interleave(kept.shape[1])
        self.branches, kept = torch.arange(kept.numel(), device=kept.device).view_as(kept), kept.flatten()
        self.stream_ids, self.stream_mask = self.stream_ids[kept], self.stream_mask[kept]
        if self.streams is not None:
            self.streams.reorder_cache(kept)


def _unknown(what: str) -> WorkbookError:
    """The error for what only the wrapped model knows."""
    return WorkbookError(f"thinking does not know {what}: leave it out, or set think=False")


def _refuse(names, given: dict, defaults):
    """Raise ``WorkbookError`` if one of ``names`` is asked for, by what is ``given`` or else by ``defaults``."""
    for name in names:
        value = given.get(name, getattr(defaults, name, None))
        if value is not None and value is not False and (name, value) != ("guidance_scale", 1):
            raise _unknown(name)


def _check_names(given: dict):
    """Raise ``ParameterError`` for a name that was meant to be a setting of the configuration."""
    for name in given:
        if difflib.get_close_matches(name, THINKING_SETTINGS, n=1, cutoff=0.7):
            raise ParameterError(f"{unknown_name(name, THINKING_SETTINGS)} It is a setting of model.config")


def _refuse_thoughts(cache):
    """Raise ``WorkbookError`` if a cache holds thoughts, which the wrapped model alone cannot read."""
    if isinstance(cache, ThinkingCache) and cache.started:
        raise WorkbookError("this cache was filled while thinking: leave it out, or set think=True")


def _check_places(input_ids, attention_mask, position_ids):
    """Raise ``WorkbookError`` unless mask and positions are those of padded texts, which is what thoughts see."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if real.dim() != 2:
        raise _unknown("an attention_mask that is not (batch, length)")
    if position_ids is not None and ((position_ids != real.cumsum(1) - 1) & (real != 0)).any():
        raise _unknown("position_ids that do not count the tokens of each text")


AutoConfig.register("quietstar", QuietStarConfig, exist_ok=True)
AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM, exist_ok=True)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["quietstar"] = "QuietStarForCausalLM"  # by this a Trainer shifts smoothed labels
