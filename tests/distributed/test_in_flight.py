"""Groups under way in one pipeline: as many as stages, each with the answers that it has alone; errors end them all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from bigkit import init_empty_weights, map_file, map_in_flight, pipeline
from bigkit.distributed import in_flight, line
from bigkit.distributed.pipeline import stage_of
from bigkit.zoo.gpt import GPT, PYGPT, GPTConfig, decode, encode, load_pygpt
from tests.distributed import stages
from tests.ranks import Ranks


def followed(model: Any) -> tuple[list[str], list[int]]:
    """What this process does from now on, in order, and the threads on which the model's blocks work."""
    stage, said, threads = stage_of(model), list[str](), list[int]()
    run, take = stage._run, stage._take

    def running(*args: Any, **options: Any) -> Any:
        said.append(f"work {stage.call.number}")
        return run(*args, **options)

    def taking(rank: int, device: torch.device) -> torch.Tensor:
        tensor = take(rank, device)
        if rank > stage.rank:
            said.append(f"token {stage.call.number}")
        return tensor

    stage._run, stage._take = running, taking  # type: ignore[method-assign]
    model.get_submodule(stage.own[-1]).register_forward_hook(lambda *_: threads.append(threading.get_ident()))
    return said, threads


def under_way(said: list[str]) -> list[int]:
    """How many groups wait for a token, each time that this process begins to work for one."""
    waiting, counts = set[str](), []
    for event in said:
        what, group = event.split()
        if what == "work":
            counts.append(len(waiting))
            waiting.add(group)
        else:
            waiting.remove(group)
    return counts


def ways(state: Any, folder: Path) -> dict[str, Any]:
    model = stages.staged(state, "pygpt", PYGPT, dtype="float32")
    said, threads = followed(model)
    batches = [torch.tensor([encode(f"x = {i}")]) for i in range(6)]
    ask = partial(model.generate, max_new_tokens=4)
    found: dict[str, Any] = {"one at a time": [ask(ids) for ids in batches], "waiting alone": under_way(said)}
    said.clear()
    found["in flight"] = map_in_flight(ask, batches, model)
    found["waiting"] = under_way(said)
    said.clear()
    found["one more"] = map_in_flight(ask, batches, model, groups=state.num_processes + 1)
    found["waiting, one more"] = under_way(said)
    found["threads"] = {*threads} == {threading.get_ident()}
    prompts = ["a longer text ", "def f(", "class A", "i", "return "]
    (folder / "prompts.txt").write_text("\n".join(prompts))

    def answer(texts: list[str]) -> list[str]:
        return [decode(model.generate(torch.tensor([encode(text)]), 1 + len(text))[0]) for text in texts]

    files = folder / "prompts.txt", folder / "out.jsonl"
    output = map_file(answer, *files, batch_size=1, progress=False, pipeline=model)
    found["file"] = [json.loads(line) for line in output.read_text().splitlines()]
    return found


def test_as_many_groups_as_stages_are_under_way(ranks: Ranks, tmp_path: Path) -> None:
    """While one waits for its token, process 0 works for all others: that is what saves time, whatever it is."""
    whole, size = load_pygpt(dtype=torch.float32), ranks.size
    alone = [whole.generate(torch.tensor([encode(f"x = {i}")]), 4) for i in range(6)]
    prompts = ["a longer text ", "def f(", "class A", "i", "return "]
    texts = [decode(whole.generate(torch.tensor([encode(text)]), 1 + len(text))[0]) for text in prompts]
    expected = [{"index": i, "prompt": p, "output": t} for i, (p, t) in enumerate(zip(prompts, texts))]
    founds = ranks(ways, tmp_path)
    for found in founds:
        assert all(map(torch.equal, found["one at a time"], alone))
        assert all(map(torch.equal, found["in flight"], alone))
        assert all(map(torch.equal, found["one more"], alone))
        assert found["file"] == expected
        assert found["threads"], "the model works on the caller's thread"
    if size > 1:
        assert founds[0]["waiting alone"] == [0] * 24
        most = min(size, 6) - 1
        assert founds[0]["waiting"] == [*range(most), *[most] * (24 - most)]
        assert max(founds[0]["waiting, one more"]) == min(size + 1, 6) - 1


def crowd(state: Any, groups: int) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line, "_UNDER_WAY", 2)  # else it takes some 40 groups
        model = stages.staged(state, "pygpt", PYGPT, dtype="float32")
        ids = [torch.tensor([encode(f"x = {i}")]) for i in range(groups)]
        return map_in_flight(partial(model.generate, max_new_tokens=2), ids, model, groups=groups)


def test_many_groups_do_not_wait_for_each_others_messages(two: Ranks) -> None:
    """Nobody takes a token before all groups have sent something: what is under way must not be limited to less."""
    whole = load_pygpt(dtype=torch.float32)
    expected = [whole.generate(torch.tensor([encode(f"x = {i}")]), 2) for i in range(14)]
    for answers in two(crowd, 14):
        assert all(map(torch.equal, answers, expected))


def ways_of_experts(state: Any, folder: Path) -> tuple[list[tuple[bool, str]], list[Any]]:
    """How experts are computed for prompts and for tokens, where `generate` switches as it does on a GPU."""
    model = stages.staged(state, "mixtral", folder)

    @contextmanager
    def switched(self: Any) -> Iterator[None]:
        before = self.get_experts_implementation()
        self.set_experts_implementation("batched_mm")
        try:
            yield
        finally:
            self.set_experts_implementation(before)

    seen, texts = list[tuple[bool, str]](), [torch.arange(3, 3 + n)[None] for n in (5, 3, 6, 2)]
    experts = model.get_submodule(next(n for n in stage_of(model).own if ".layers." in n) + ".mlp.experts")
    experts.register_forward_pre_hook(
        lambda _, args: seen.append((len(args[0]) > 1, model.config._experts_implementation))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_optimize_model_for_decode", switched)
        said = map_in_flight(partial(model.generate, max_new_tokens=4, do_sample=False, pad_token_id=0), texts, model)
    return seen, [*said, model.config._experts_implementation]


def test_a_prompt_is_read_as_ever_while_another_group_decodes(two: Ranks, tmp_path: Path) -> None:
    """`batched_mm` takes a copy of an expert for each token that chose it: 512 GiB for a prompt of Mixtral's shape."""
    folder = stages.saved("mixtral", tmp_path)
    for seen, (*_, afterwards) in two(ways_of_experts, folder):
        assert {*seen} == {(True, "grouped_mm"), (False, "batched_mm")} and afterwards == "grouped_mm"


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


class FakeStream:
    """Notes what it waits for; its work is never done before the test says so."""

    log: list[tuple[int, Any]] = []  # thread, event
    done = threading.Event()

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((threading.get_ident(), (self, other)))

    def synchronize(self) -> None:
        assert self.done.wait(10), "a turn waits for the GPU"


class FakeEvent(FakeStream):
    def record(self) -> None:
        pass


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_no_turn_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both groups have worked, and have handed over their tokens, before the GPU has done anything."""
    FakeStream.log, FakeStream.done = [], threading.Event()
    of_all = FakeStream()
    fakes = {"Stream": FakeStream, "Event": FakeEvent, "current_stream": lambda: of_all}
    for name, fake in {**fakes, "set_stream": lambda _: None, "set_device": lambda _: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(in_flight, "_modes", lambda kind: nullcontext)
    turns = in_flight._Turns(2, torch.device("cuda", 1), lambda: lambda: None)
    sent: list[tuple[int, float]] = []

    def work(slot: int) -> None:
        turns.begin(slot)
        turns.on_caller(lambda: FakeStream.log.append((threading.get_ident(), slot)))
        token = torch.full((1,), slot + 0.5).as_subclass(OnGPU)
        turns.send_when_there(token, lambda copied: sent.append((slot, float(copied))))
        token.zero_()  # whose it is may change it
        if slot == 1:
            assert sent == []
            FakeStream.done.set()
        turns.pass_on()
        turns.settle()
        turns.leave()

    turns.run(work)
    assert sent == [(0, 0.5), (1, 1.5)]
    first, _, _, second, *_ = said = [event for thread, event in FakeStream.log if thread == threading.get_ident()]
    own = [first[1], second[1]]
    assert own[0] is not own[1]
    assert said == [(of_all, own[0]), 0, (own[0], of_all), (of_all, own[1]), 1, (own[1], of_all)]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_a_mailer_that_waits_for_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """It is waited for once, whatever else is under way; of an interrupted call nothing more is sent."""
    monkeypatch.setattr(in_flight, "_PATIENCE", 0.2)
    turns = in_flight._Turns(3, torch.device("cpu"), lambda: lambda: None)
    free, sent = threading.Event(), list[float]()

    def send(tensor: torch.Tensor) -> None:
        assert free.wait(60)
        sent.append(float(tensor))

    def stop() -> None:
        raise error("enough")

    def work(slot: int) -> None:
        turns.begin(slot)
        turns.send_when_there(torch.tensor(float(slot)), send)
        if slot == 2:
            turns.on_caller(stop)
        turns.pass_on()

    start = time.monotonic()
    with pytest.raises(error):
        turns.run(work)
    assert time.monotonic() - start < 0.5 and turns.stuck
    free.set()
    mailer = next((thread for thread in threading.enumerate() if "kept" in thread.name), None)
    if mailer is not None:
        mailer.join(60)
    assert sent == ([0.0] if error is KeyboardInterrupt else [0.0, 1.0, 2.0])


def test_after_a_thread_was_left_behind_the_next_call_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with init_empty_weights():
        model: Any = GPT(GPTConfig("pygpt"))
    model = pipeline(model, PYGPT, dtype="float32").eval()
    ids, free = torch.tensor([encode("import ")]), threading.Event()
    monkeypatch.setattr(in_flight, "_PATIENCE", 0.05)

    def ask(ids: torch.Tensor) -> None:
        stage_of(model).turns.give_up(KeyboardInterrupt())
        free.wait(60)

    with pytest.raises(KeyboardInterrupt):
        map_in_flight(ask, [ids], model)
    free.set()
    for run in (lambda: model.generate(ids, 2), lambda: map_in_flight(lambda x: model.generate(x, 2), [ids], model)):
        with pytest.raises(RuntimeError, match="interrupted while it waited for another process: start all processes"):
            run()


def fails(state: Any) -> dict[str, Any]:
    model = stages.staged(state, "pygpt", PYGPT, dtype="float32")
    batches = [torch.tensor([encode(text)]) for text in ("import ", "def f(", "class A", "return ")]
    steps: list[int] = []

    def ask(ids: torch.Tensor, at: int = 9) -> torch.Tensor:
        def rule(*_: Any) -> None:
            steps.append(1)
            if len(steps) == at:
                raise KeyError("in the middle")

        hook = model.register_forward_pre_hook(rule)
        try:
            return model.generate(ids, 6)
        finally:
            hook.remove()

    said: dict[str, Any] = {}
    for way, run in (("in flight", partial(map_in_flight, ask, batches, model)), ("alone", lambda: ask(batches[0], 3))):
        steps.clear()
        try:
            run()
        except KeyError as error:
            said[f"{way}, error"] = str(error)
        said[f"{way}, threads"] = threading.active_count()
        said[f"{way}, after"] = model.generate(batches[0], 6)  # what was under way has the same inputs
        said[f"{way}, flight after"] = map_in_flight(lambda ids: model.generate(ids, 6), batches, model)
    try:
        map_in_flight(lambda ids: map_in_flight(lambda x: x, [ids], model), batches, model)
    except ValueError as error:
        said["nested"] = str(error)
    try:
        map_in_flight(ask, batches, model, groups=0)
    except ValueError as error:
        said["no groups"] = str(error)
    said["none"] = map_in_flight(ask, [], model)
    said["one"] = map_in_flight(lambda ids: model.generate(ids, 6), batches[:1], model)
    return said


def test_after_an_error_the_next_answers_are_right(ranks: Ranks) -> None:
    whole = load_pygpt(dtype=torch.float32)
    expected = [whole.generate(torch.tensor([encode(x)]), 6) for x in ("import ", "def f(", "class A", "return ")]
    for said in ranks(fails):
        for way in ("in flight", "alone"):
            assert said[f"{way}, error"] == "'in the middle'"
            assert torch.equal(said[f"{way}, after"], expected[0]), way
            assert all(map(torch.equal, said[f"{way}, flight after"], expected)), way
        assert said["in flight, threads"] == said["alone, threads"], "no thread is left"
        assert said["nested"].startswith("map_in_flight was called by a function that it runs")
        assert said["no groups"] == "groups is 0: expected at least one batch under way"
        assert said["none"] == [] and torch.equal(said["one"][0], expected[0])


# ---------------------------------------------------------------------------------------------------------------------
# Ways to ask

PROMPTS = [[3, 9, 2, 4, 8, 6], [0, 0, 0, 7, 11, 5], [0, 5, 2, 9, 1, 4], [0, 0, 0, 0, 0, 13], [6, 6, 6, 1, 2, 3]]
UNEVEN = (PROMPTS[:3], [row[3:] for row in PROMPTS[1:3]], PROMPTS[3:], [PROMPTS[0][:2]], PROMPTS)  # groups


def settings(whole: Any) -> dict[str, dict[str, Any]]:
    """Options of `generate`, by name; some sequences end early, each at a token of its own."""
    padded: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    ids = torch.tensor(PROMPTS)
    free = whole.generate(ids, attention_mask=ids.ne(0).long(), **padded)
    ends = [int(free[row, 6 + row % 3]) for row in range(len(PROMPTS))]
    return {
        "greedy": padded, "ends": {**padded, "eos_token_id": ends},
        "static": {**padded, "cache_implementation": "static", "disable_compile": True},
        "penalty": {**padded, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    }  # fmt: skip


def ask(model: Any, rows: list[list[int]], options: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor(rows)
    return model.generate(ids, attention_mask=ids.ne(0).long(), **options)


def asked(state: Any, family: str, folder: Path, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    model = stages.staged(state, family, folder)
    said: dict[str, Any] = {}
    for way, options in ways.items():
        said[way] = map_in_flight(partial(ask, model, options=options), UNEVEN, model)
    drawn = {**ways["greedy"], "do_sample": True, "temperature": 1.5}
    for way in ("drawn", "drawn again"):
        torch.manual_seed(state.process_index if way == "drawn" else 0)  # that of the last process counts
        torch.manual_seed(5) if state.is_last_process else None
        said[way] = map_in_flight(partial(ask, model, options=drawn), UNEVEN, model)

    def changed(rows: list[list[int]]) -> torch.Tensor:
        """Logits, which the caller changes at once."""
        logits = model(torch.tensor(rows)).logits
        kept = logits.clone()
        logits.zero_()
        return kept

    said["logits"] = map_in_flight(changed, UNEVEN, model)

    def half(rows: list[list[int]]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.tensor(rows)).logits.float()

    said["autocast within"] = map_in_flight(half, UNEVEN, model)
    with torch.autocast("cpu", torch.bfloat16):
        said["autocast around"] = map_in_flight(lambda rows: model(torch.tensor(rows)).logits.float(), UNEVEN, model)
    with torch.inference_mode():
        said["inference"] = map_in_flight(partial(ask, model, options=ways["greedy"]), UNEVEN, model)
    return said


@pytest.mark.parametrize(("family", "size"), [("llama, grouped", "three"), ("gemma3", "two")])
def test_every_group_is_answered_as_if_alone(family: str, size: str, tmp_path: Path, request: Any) -> None:
    folder = stages.saved(family, tmp_path)
    whole = getattr(tf, stages.FAMILIES[family][0]).from_pretrained(folder, dtype=torch.float32).eval()
    ways = settings(whole)
    expected = {way: [ask(whole, rows, options) for rows in UNEVEN] for way, options in ways.items()}
    with torch.no_grad():
        expected["logits"] = [whole(torch.tensor(rows)).logits for rows in UNEVEN]
        with torch.autocast("cpu", torch.bfloat16):
            halves = [whole(torch.tensor(rows)).logits.float() for rows in UNEVEN]
    expected |= {"autocast within": halves, "autocast around": halves, "inference": expected["greedy"]}
    assert not torch.equal(halves[0], expected["logits"][0])
    assert any(len({row.tolist().count(0) for row in rows}) > 1 for rows in expected["ends"]), "some end early"
    for said in request.getfixturevalue(size)(asked, family, folder, ways):
        for way, answers in expected.items():
            assert all(map(torch.equal, said[way], answers)), way
        assert all(map(torch.equal, said["drawn"], said["drawn again"])), "the same seed, the same answers"
