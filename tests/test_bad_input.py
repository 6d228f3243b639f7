"""Bad inputs and faults: each is answered by one sentence that names the cause, and leaves finished work untouched."""

import contextlib
import hashlib
import json
import multiprocessing
import resource
import shutil
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import problems, tiny_champion, tiny_lm, tiny_quiet_star
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

import qs_lib as qs
from qs_lib import champion, errors
from qs_lib.data import batches
from qs_lib.data import problems as hub
from qs_lib.evaluation import accuracy
from qs_lib.experiments.arms import repeat
from qs_lib.files import find_run, lock_run, run_folder, write_bytes
from qs_lib.training import baking, pretrain, reinforce
from qs_lib.training.checkpoint import Checkpoint
from qs_lib.training.qk_clip import watch_max_logits
from qs_lib.workbook import params as p
from qs_lib.workbook.params import read_variant
from qs_lib.workbook.run import main, print_scoreboard
from qs_lib.workbook.stage import read_stage, start_stage

NAN = float("nan")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A scratch folder with a finished run, a saved model, and the hub's address pointing nowhere."""
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("QS_DEBUG", raising=False)
    stage = start_stage(p.TokenSetup(run_name="done"), "01_token_setup")
    model, tokenizer = tiny_lm()
    stage.save_model("champion", model, tokenizer)
    stage.finish({"steps": 1})
    shutil.copytree(stage.folder / "champion", tmp_path / "model")
    return tmp_path


def saved(place, change=None, drop=()):
    """The saved model with its weights changed, or without some of its files."""
    folder = place / "model"
    if change:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    for name in drop:
        (folder / name).unlink()
    return str(folder)


def lines(place, data: bytes):
    (place / "data.jsonl").write_bytes(data)
    return str(place / "data.jsonl")


def renamed(place):
    weights = load_file(place / "model" / "model.safetensors")
    weights = {("x." + k if "layers.0" in k else k): v for k, v in weights.items()}
    save_file(weights, place / "model" / "model.safetensors", {"format": "pt"})
    return str(place / "model")


def bigger_tokenizer(place):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "model")
    tokenizer.add_tokens([f"new{i}" for i in range(500)])
    tokenizer.save_pretrained(place / "model")
    return str(place / "model")


def other_model(place):
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "intermediate_size": 96}))
    return str(place / "model")


def code_of_its_own(place):
    config = json.loads((place / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (place / "model" / "config.json").write_text(json.dumps(config))
    (place / "model" / "evil.py").write_text(f"open({str(place / 'canary')!r}, 'w')")
    return str(place / "model")


def pickled(place):
    (place / "model" / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, place / "model" / "pytorch_model.bin")
    return str(place / "model")


def driver(*options):
    """The command line; its error as an exception, so that all cases look alike."""
    import io

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(options))
    assert code == 1 and "Traceback" not in err.getvalue()
    raise errors.WorkbookError(err.getvalue().removeprefix("error: ").strip())


def nan_weights(model):
    with torch.no_grad():
        next(model.parameters()).fill_(NAN)
    return model


def nan_champion():
    model, tokenizer = tiny_champion()
    pretrain.pretrain(nan_weights(model), tokenizer, [("a", "b"), ("c", "d")], steps=2, batch_size=2)


def nan_rl():
    model, tokenizer = tiny_quiet_star()
    original = reinforce.quiet_star_loss
    try:
        reinforce.quiet_star_loss = lambda *a, **k: (torch.tensor(NAN, requires_grad=True), {}, ())
        qs.train_quiet_star(
            model,
            tokenizer,
            problems(),
            problems("validation"),
            steps=1,
            batch_size=2,
            num_thoughts=2,
            thought_length=5,
        )
    finally:
        reinforce.quiet_star_loss = original


def nan_gradient():
    model, _ = tiny_champion()
    optimizer = qs.MuonGrokfast(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    model.model.norm.weight.grad[0] = NAN
    optimizer.step()


def no_teacher():
    model, tokenizer = tiny_lm()
    baking.bake(
        model,
        tokenizer,
        [],
        problems(),
        problems("validation"),
        epochs=1,
        trajectories=0,
        rehearsal=0.0,
        max_new_tokens=2,
    )


def full_disk(write):
    """``write`` under a limit of a few kilobytes per file."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def big_checkpoint(place):
    Checkpoint(place / "c").save(1, {"model": torch.nn.Linear(64, 64)})


def big_model(place):
    stage = start_stage(p.TokenSetup(run_name="new"), "01_token_setup")
    stage.save_model("champion", tiny_champion()[0])


FORK = multiprocessing.get_context("fork")  # a fresh Python would import torch again


def hold(pipe, *what):
    with lock_run(*what) as lock:
        pipe.send(lock.is_locked)
        pipe.recv()


@contextlib.contextmanager
def held_by_another_process(*what):
    here, there = FORK.Pipe()
    holder = FORK.Process(target=hold, args=(there, *what), daemon=True)
    holder.start()
    there.close()
    try:
        assert here.recv()
        yield
    finally:
        holder.kill()
        holder.join()


def two_in_one_folder(place):
    with held_by_another_process(place / "outputs" / "busy", "the first"):
        lock_run(place / "outputs" / "busy", "the second")


def silent_hub(call):
    """``call`` while the hub's address is a server that accepts and says nothing; it must give up within ten seconds."""
    server = socket.create_server(("127.0.0.1", 0))
    with pytest.MonkeyPatch.context() as patch, server:
        patch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        patch.setattr(hub, "HUB_TIMEOUT", 1.0)
        started = time.monotonic()
        try:
            call()
        finally:
            assert time.monotonic() - started < 10


def refused_hub(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        call()


def old_run(place):
    path = place / "outputs/done/01_token_setup/run.json"
    record, kept = json.loads(path.read_text()), path.read_text()
    path.write_text(json.dumps(record | {"format_version": 99}))
    try:
        start_stage(p.Baking(run_name="next", upstream="done"), "03_baking", needs=("01_token_setup",))
    finally:
        path.write_text(kept)


def flipped_upstream(place):
    path = place / "outputs/done/01_token_setup/champion/model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        start_stage(p.Baking(run_name="next", upstream="done"), "03_baking", needs=("01_token_setup",))
    finally:
        path.write_bytes(kept)


def two_of_one_experiment(place):
    with held_by_another_process(place / "e", "experiment rl", ".rl.lock"):
        repeat(place / "e/rl.csv", {"a": {}}, [0], None)


def load(source):
    return lambda place: list(qs.load_problems(source(place) if callable(source) else source))


GOOD = b'{"question": "q", "answer": "#### 1"}\n'
CASES = {
    # parameters and run names
    "misspelt parameter": (
        lambda _: p.Reinforce(run_name="a", stepz=1),
        "unknown parameter 'stepz'; did you mean steps?",
    ),
    "unlike any parameter": (
        lambda _: p.Scoreboard(run_name="a", zzz=1),
        "known are run_name, seed, upstream",
    ),
    "too small": (
        lambda _: p.Reinforce(run_name="a", steps=0),
        "parameter steps=0: input should be greater",
    ),
    "wrong type": (
        lambda _: p.Reinforce(run_name="a", steps="many"),
        "parameter steps='many': input should be a valid integer",
    ),
    "fraction of a step": (lambda _: p.Reinforce(run_name="a", steps=1.5), "steps=1.5"),
    "infinite rate": (lambda _: p.Baking(run_name="a", muon_lr=float("inf")), "muon_lr=inf"),
    "rate not a number": (lambda _: p.Baking(run_name="a", muon_lr=NAN), "muon_lr=nan"),
    "negative seed": (lambda _: p.Baking(run_name="a", seed=-1), "seed=-1"),
    "unknown choice": (
        lambda _: p.Reinforce(run_name="a", objective="best"),
        "'signed', 'positive', 'paper' or 'rlp'",
    ),
    "no model listed": (lambda _: p.Latency(run_name="a", random_models=[]), "random_models=[]"),
    "run name missing": (lambda _: p.Scoreboard(), "parameter run_name is missing"),
    "run name leaves": (lambda _: run_folder("../x"), "'../x' cannot name a run"),
    "run name absolute": (lambda _: run_folder("/etc"), "cannot name a run"),
    "run name empty": (lambda _: run_folder(""), "cannot name a run"),
    "run name too long": (lambda _: run_folder("a" * 65), "at most 64"),
    "run name with braces": (lambda _: run_folder("{x}"), "cannot name a run"),
    "run name hidden": (lambda _: p.Scoreboard(run_name=".git"), "cannot name a folder"),
    "link out of outputs": (
        lambda at: ((at / "outputs/link").symlink_to(at), run_folder("link")),
        "a link that leaves",
    ),
    "file outside its stage": (
        lambda _: start_stage(p.TokenSetup(run_name="new"), "01_token_setup").path("../../x"),
        "not inside the stage's folder",
    ),
    "code in a name": (
        lambda _: p.check_parameters(
            champion.find_run("").parents[1] / "notebooks/05_rl.ipynb", {"x=0;open('f','w');y": 1}
        ),
        "unknown parameter",
    ),
    # files of parameters and the command line
    "unknown variant": (lambda _: driver("--variant", "pockett"), "unknown variant 'pockett'; did you mean pocket?"),
    "unknown stage": (lambda _: driver("--only", "05_rk"), "unknown stage '05_rk'; did you mean 05_rl?"),
    "no such data": (lambda _: driver("--data", "/nowhere"), "there is no file or folder /nowhere"),
    "no notebooks": (lambda at: driver("--notebooks", str(at)), "there are no notebooks"),
    "yaml with a python object": (lambda at: variant(at, "x: !!python/object/apply:os.getcwd []"), "is not YAML"),
    "yaml that is a list": (lambda at: variant(at, "[1, 2]"), "lines of the form 'name: value'"),
    "yaml in latin-1": (lambda at: variant(at, "a: \xe4".encode("latin-1")), "is not YAML"),
    "yaml cut off": (lambda at: variant(at, "a: [1, 2"), "is not YAML"),
    # data
    "no such source": (load("/nowhere"), "no problems at /nowhere: give 'pocket', 'gsm8k', a folder"),
    "unknown split": (lambda _: qs.load_problems("pocket", "dev"), "it must be train, validation or test"),
    "empty file": (load(lambda at: lines(at, b"")), "holds no train problems"),
    "blank line": (load(lambda at: lines(at, GOOD + b"\n" + GOOD)), "data.jsonl:2 is not a JSON object"),
    "torn line": (load(lambda at: lines(at, GOOD + GOOD[:20])), "data.jsonl:2 is not a JSON object"),
    "number instead of text": (
        load(lambda at: lines(at, b'{"question": 1, "answer": "#### 1"}\n')),
        "data.jsonl:1: question and answer must be text",
    ),
    "bare number": (load(lambda at: lines(at, b"5\n")), "data.jsonl:1 is not a JSON object"),
    "no answer": (load(lambda at: lines(at, b'{"question": "q"}\n')), "data.jsonl:1 is not a JSON object"),
    "no final number": (
        load(lambda at: lines(at, b'{"question": "q", "answer": "none"}\n')),
        "data.jsonl:1: no '#### number'",
    ),
    "latin-1": (
        load(lambda at: lines(at, '{"question": "\xe4", "answer": "#### 1"}'.encode("latin-1"))),
        "data.jsonl:1 is not a JSON object",
    ),
    "lone surrogate": (
        load(lambda at: lines(at, b'{"question": "\\ud800", "answer": "#### 1"}\n')),
        "data.jsonl:1: the text is not valid Unicode",
    ),
    "deep nesting": (load(lambda at: lines(at, b"[" * 100_000)), "data.jsonl:1 is not a JSON object"),
    "endless line": (
        load(lambda at: lines(at, b'{"question": "' + b"a" * 2_000_000 + b'", "answer": "#### 1"}')),
        "data.jsonl:1 has 2,000,0",
    ),
    "huge number": (
        load(lambda at: lines(at, b'{"question": "q", "answer": "#### ' + b"9" * 5000 + b'"}')),
        "data.jsonl:1: ",
    ),
    "too many distinct": (
        lambda _: qs.load_problems("pocket", "test", 10**7),
        "fewer than 10000000 different test problems",
    ),
    "not an episode": (lambda at: qs.read_episodes(lines(at, b'{"a": 1}')), "data.jsonl:1 is not an episode"),
    "table without a column": (
        load(lambda at: ((at / "t.csv").write_bytes(b"Question,Answer\n"), at / "t.csv")[1]),
        "t.csv:1 has no column Numbers",
    ),
    "scoreboard torn": (lambda at: print_scoreboard(lines(at, b"[{")), "is not a scoreboard"),
    # models
    "no folder and no hub": (
        lambda _: qs.load_champion("some/model"),
        "there is no folder some/model, the hub does not answer",
    ),
    "a name no folder and no hub has": (
        lambda _: qs.load_champion("./my model"),
        "there is no folder ./my model, the hub does not answer",
    ),
    "an unknown user's home": (
        lambda _: qs.load_champion("~nobody-here/model"),
        "there is no folder ~nobody-here/model",
    ),
    "silent hub, model": (lambda _: silent_hub(lambda: qs.load_champion("some/model")), "the hub does not answer"),
    "silent hub, data": (
        lambda _: silent_hub(lambda: qs.load_problems("gsm8k")),
        "the hub is out of reach for openai/gsm8k",
    ),
    "refused hub": (lambda _: refused_hub(lambda: qs.load_champion("some/model")), "the hub does not answer"),
    "weights cut off": (lambda at: qs.load_champion(saved(at, lambda b: b[: len(b) // 2])), "cannot be loaded"),
    "weights empty": (lambda at: qs.load_champion(saved(at, lambda b: b"")), "cannot be loaded"),
    "no weights": (lambda at: qs.load_champion(saved(at, drop=["model.safetensors"])), "cannot be loaded"),
    "no config": (lambda at: qs.load_champion(saved(at, drop=["config.json"])), "cannot be loaded"),
    "no tokenizer": (
        lambda at: qs.load_champion(saved(at, drop=["tokenizer.json", "tokenizer_config.json"])),
        "cannot be loaded",
    ),
    "pickled weights": (lambda at: qs.load_champion(pickled(at)), "weights in safetensors"),
    "code of its own": (lambda at: qs.load_champion(code_of_its_own(at)), "cannot be loaded"),
    "weights of another model": (lambda at: qs.load_champion(other_model(at)), "cannot be loaded"),
    "missing layers": (lambda at: qs.load_champion(renamed(at)), "lacks weights"),
    "larger tokenizer": (lambda at: qs.load_champion(bigger_tokenizer(at)), "they do not belong together"),
    "unknown family": (
        lambda _: champion.build_champion(tiny_champion()[1], "gpt9"),
        "architecture 'gpt9'; known: llama, qwen2",
    ),
    "no thinking tokens": (lambda _: qs.QuietStarForCausalLM.from_base(tiny_champion()[0]), "call add_thinking_tokens"),
    "unknown mixing": (lambda _: qs.QuietStarConfig(mixing="sum"), "'log_probs' or 'hidden'"),
    # trainings
    "no documents": (lambda _: pretrain.pretrain(*tiny_champion(), [], steps=1), "corpus is empty"),
    "no problems": (
        lambda _: qs.train_quiet_star(*tiny_quiet_star(), [], problems()),
        "at least one training and one validation problem",
    ),
    "champion's loss NaN": (lambda _: nan_champion(), "the champion's loss is nan at step 0: lower the learning rates"),
    "reinforcement's loss NaN": (lambda _: nan_rl(), "the loss is nan at step 0: lower the learning rates"),
    "gradient NaN": (lambda _: nan_gradient(), "gradient is not finite in model.norm.weight; nothing was updated"),
    "teacher without a thought": (lambda _: no_teacher(), "writes no thought on held-out questions"),
    "QK-clip for a family that cannot be watched": (
        lambda _: watched_bloom(),
        "cannot run with sdpa attention, so its logits cannot be watched: set qk_clip_threshold to 0",
    ),
    "unknown place to think": (
        lambda _: batches.think_where(*tiny_lm(), problems(), "here"),
        "'question', 'difficult', 'uncertain', 'random' or 'every'",
    ),
    "too few problems that fit": (
        lambda _: qs.reasoning_dataset(problems(size=8)),
        "problems fit mece, 200 are needed",
    ),
    "one problem to attack with": (
        lambda _: qs.anti_theater(*tiny_quiet_star(), problems()[:1], problems()[:1]),
        "at least two held-out problems",
    ),
    "NaN in the record": (
        lambda _: start_stage(p.TokenSetup(run_name="new"), "01_token_setup").log(loss=NAN),
        "NaN or infinity cannot be recorded",
    ),
    # runs and files
    "no such upstream": (lambda _: find_run("nowhere"), "there is no run 'nowhere'"),
    "upstream without the stage": (
        lambda _: start_stage(p.Reinforce(run_name="next", upstream="done"), "05_rl", needs=("03_baking",)),
        "needs 03_baking of the run done",
    ),
    "upstream of a newer version": (old_run, "format 99"),
    "upstream with a flipped bit": (flipped_upstream, "has changed"),
    "two runs in one folder": (two_in_one_folder, "run busy is in use by process"),
    "two of one experiment": (two_of_one_experiment, "is in use by process"),
    "disk full, file": (lambda at: full_disk(lambda: write_bytes(at / "f", b"0" * 10_000)), "no space left to write"),
    "disk full, checkpoint": (lambda at: full_disk(lambda: big_checkpoint(at)), "no space left to write"),
    "disk full, model": (lambda at: full_disk(lambda: big_model(at)), "no space left to write"),
    "file where a folder must be": (
        lambda at: write_bytes(at / "outputs/done/01_token_setup/run.json/x", b""),
        "cannot be written",
    ),
}


def watched_bloom():
    with watch_max_logits(BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))):
        pass


def variant(place, text):
    path = place / "params/01_token_setup/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    read_variant("mine", place)


def fingerprint(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


def test_there_are_enough_of_them():
    assert len(CASES) >= 60 and accuracy is not None and repeat is not None


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_lost(name, place):
    act, words = CASES[name]
    before = fingerprint(place / "outputs/done")
    with pytest.raises(errors.WorkbookError) as found:
        act(place)
    sentence = str(found.value)
    assert words in sentence, sentence
    assert len(sentence.splitlines()) == 1 and len(sentence) < 700 and "Traceback" not in sentence
    assert found.value._render_traceback_() == [f"{type(found.value).__name__}: {sentence}"], (
        "notebooks show no traceback"
    )
    assert fingerprint(place / "outputs/done") == before and read_stage(place / "outputs/done/01_token_setup")[0]
    assert not (place / "canary").exists() and not list(place.rglob("*.tmp"))
