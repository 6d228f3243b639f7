"""What each training can be told: every parameter once, with its default and what it does."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..settings import Settings


class _Rates(Settings):
    @model_validator(mode="after")
    def _one_moves(self):
        if self.muon_lr == self.adamw_lr == 0:
            raise ValueError("muon_lr and adamw_lr are both 0: nothing would be trained")
        return self


class PretrainSettings(_Rates):
    """How the champion is trained. Defaults are the pocket champion's."""

    steps: int = Field(8000, ge=1)  # training steps
    batch_size: int = Field(32, ge=1)  # documents a step
    muon_lr: float = Field(0.02, ge=0)  # learning rate of Muon, hidden matrices
    adamw_lr: float = Field(3e-3, ge=0)  # learning rate of AdamW, embeddings and norms
    weight_decay: float = Field(0.1, ge=0, le=1)  # decoupled; 0 is off
    context_weight: float = Field(0.1, ge=0, le=1)  # weight of a context's tokens in the loss; 1 for whole texts
    seed: int = Field(0, ge=0, lt=2**32)  # every random draw derives from it


class BakingSettings(_Rates):
    """How prompts are baked."""

    epochs: int = Field(6, ge=1)  # passes over worked examples and trajectories
    trajectories: int = Field(1800, ge=0)  # replies sampled from the prompted teacher, at most
    batch_size: int = Field(32, ge=2)  # replies a step, rehearsed answers included
    prompt_epochs: int = Field(0, ge=0)  # passes over worked examples that teach the prompts first, see `learn_prompts`
    privilege: Literal["none", "equation", "foreign"] = "none"  # equations the teacher is told: none, right, foreign
    muon: bool = True  # Muon on hidden matrices, else AdamW on all
    muon_lr: float = Field(6e-3, ge=0)  # learning rate of Muon, hidden matrices
    adamw_lr: float = Field(1.5e-3, ge=0)  # learning rate of AdamW, embeddings and norms
    grokfast_lambda: float = Field(0.2, ge=0)  # strength of the slow-gradient filter; 0 is off
    ce_weight: float = Field(1.0, ge=0)  # weight of the cross-entropy on worked examples beside the KL
    rehearsal: float = Field(0.25, ge=0, lt=1)  # share of a batch that rehearses direct answers
    lora_rank: int = Field(0, ge=0)  # rank of a LoRA adapter to train in place of all weights (needs peft); 0 is none
    qk_clip_threshold: float = Field(0.0, ge=0)  # largest attention logit allowed (QK-Clip); 0 is off
    gradient_checkpointing: bool = False  # run layers again in the backward pass in place of keeping what they computed
    bf16: bool = False  # train under autocast to bfloat16; the weights stay float32
    max_new_tokens: int = Field(48, ge=2)  # longest reply, in tokens
    seed: int = Field(0, ge=0, lt=2**32)  # every random draw derives from it

    @property
    def rehearsed(self) -> int:
        """The number of direct answers in a batch."""
        return max(1, round(self.batch_size * self.rehearsal)) if self.rehearsal else 0

    @model_validator(mode="after")
    def _thoughts_have_room(self):
        if self.rehearsed == self.batch_size:
            whole = f"rehearsal={self.rehearsal} of batch_size={self.batch_size}"
            raise ValueError(f"{whole} leaves no place for replies with thoughts: lower rehearsal")
        return self


class QuietStarSettings(_Rates):
    """How thoughts are trained."""

    head_sees_all: ClassVar[bool] = True  # the mixing head learns from all drawn problems, none of them too steep
    steps: int = Field(300, ge=1)  # RL steps
    batch_size: int = Field(32, ge=1)  # problems whose thoughts are trained on, each step
    num_thoughts: int = Field(4, ge=2, le=64)  # thoughts per position: each is the others' baseline
    thought_length: int = Field(28, ge=3)  # most tokens of a thought, both tags counted
    temperature: float = Field(1.0, gt=0)  # sampling temperature of the thoughts that are trained on
    n_true: int = Field(4, ge=1)  # true tokens after a thought that its reward looks at
    over: int = Field(2, ge=1)  # problems sampled per problem kept: those whose thoughts disagree most
    pass_low: float = Field(0.0, ge=0, le=1)  # train on problems of at least this pass rate, see `within_band`
    pass_high: float = Field(1.0, ge=0, le=1)  # and of at most this
    muon: bool = True  # Muon on hidden matrices, else AdamW on all
    muon_lr: float = Field(1.5e-3, ge=0)  # learning rate of Muon, hidden matrices
    adamw_lr: float = Field(1e-3, ge=0)  # learning rate of AdamW, embeddings, norms and mixing head
    head_lr: float = Field(0.0, ge=0)  # learning rate (AdamW) of the mixing head; 0 is that of the other weights
    grokfast_lambda: float = Field(0.1, ge=0)  # strength of the slow-gradient filter; 0 is off
    token_scale: float = Field(1.0, gt=0)  # scale on the updates of the thinking tokens' rows
    lora_rank: int = Field(0, ge=0)  # rank of a LoRA adapter to train in place of all weights (needs peft); 0 is none
    qk_clip_threshold: float = Field(0.0, ge=0)  # largest attention logit allowed (QK-Clip); 0 is off
    gradient_checkpointing: bool = False  # run layers again in the backward pass in place of keeping what they computed
    bf16: bool = False  # train under autocast to bfloat16; the weights stay float32
    reward: Literal["likelihood", "probability", "correct"] = "likelihood"  # gain in nats, p(truth), or 1 if right
    objective: Literal["signed", "positive", "paper", "rlp"] = "positive"  # advantages used, see `advantages`
    think_at: Literal["question", "difficult", "uncertain", "random", "every"] = "question"  # see `think_where`
    num_positions: int = Field(8, ge=1)  # difficult, uncertain or random tokens per text
    adaptive_length: bool = False  # thoughts of a fifth of the text's tokens, 10 to 20, at most thought_length
    pg_weight: float = Field(1.0, ge=0)  # weight of the REINFORCE term
    nll_weight: float = Field(0.5, ge=0)  # weight of the mixture's negative log-likelihood; 0 fits the head afterwards
    thought_nll_weight: float = Field(0.0, ge=0)  # the same of each thought alone, which teaches to read on behind it
    look_ahead_weight: float = Field(0.5, ge=0)  # weight of the mixture's tokens after the first
    kl_coefficient: float = Field(0.1, ge=0)  # KL of thoughts to the reference model
    base_kl: float = Field(1.0, ge=0)  # KL of the prediction without thoughts to the reference model
    use_curriculum: bool = True  # easy problems first
    hardest_share: float = Field(0.4, ge=0, le=1)  # share of a batch taken from the hardest problems reached
    evaluate_every: int = Field(50, ge=1)  # steps between validations
    seed: int = Field(0, ge=0, lt=2**32)  # every random draw derives from it
