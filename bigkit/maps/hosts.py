"""Which blocks of a model work on which host: the chain of blocks cut over bytes and rates, and a `Plan` for each part.

A stage is what one process holds: a stretch of blocks, and at the two ends what is before and after all blocks. A host
that has T seconds for a token can read only so many bytes: those in its GPUs at their rate, then those in RAM at the
link's, then those on disk. These are the rooms into which `Chain` cuts; the smallest T for which the chain fits makes
the slowest stage as fast as it can be. Within a stage, layers are placed as on any machine (`strategies.place`).

Leaves out: several models, splitting layers (`tensors.py` says what it would give), and running (`bigkit.pipeline`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ..devices import prefixes
from ..machine.hardware import Hardware, machine_of
from ..machine.ledger import calibration_of, overhead_of
from ..machine.network import NETWORKS, Network, network_of, run_stages
from ..machine.streams import Span
from ..model.activations import working_bytes
from ..model.estimate import tokens_seen
from ..model.experts import experts_of
from ..model.spec import Layer, ModelSpec, ModuleSpec
from ..units import counted, dtype_bits, format_bytes, format_seconds, listed, parse_bytes, three_figures
from .engines import commands
from .partition import Chain, last_true
from .plan import Plan, PlanError
from .predict import ASSUMED, all_rates, picked, predict
from .strategies import place
from .tensors import tokens_if_split


@dataclass(frozen=True)
class Stage:
    """What one process holds.

    Args:
        host: the machine's name.
        names: the modules that rest there and nowhere else, in the model's order.
        blocks: how many of them are blocks.
        plan: where they rest on that machine.
        seconds: predicted for a token of each sequence of one group, on that machine alone.
        alone: the same for one sequence.
    """

    host: str
    names: tuple[str, ...]
    blocks: int
    plan: Plan
    seconds: float
    alone: float


@dataclass(frozen=True)
class HostsPlan:
    """A model over several hosts: plain data. Made by `plan_hosts`, applied by `bigkit.pipeline`.

    Args:
        model: the model's name.
        network: the line between the hosts.
        stages: what each process holds, in order.
        batch: sequences under way, in all groups together.
        hidden: bytes of the hidden states of one token of one sequence: what goes over the line.
        one, many: predicted tokens a second of one sequence, and of `batch` sequences (at least one a group) in as many
            groups as there are stages.
        left_out: hosts that hold nothing, because the others are faster without them.
        split: tokens a second of one sequence if every layer were split over all GPUs (see `tensors.py`); None: it
            would not fit.
    """

    model: str
    network: Network
    stages: tuple[Stage, ...]
    batch: int
    hidden: int
    one: float
    many: float
    left_out: tuple[str, ...] = ()
    split: float | None = None

    @property
    def groups(self) -> int:
        """Groups of sequences that keep every stage busy: one for each."""
        return len(self.stages)

    @property
    def each(self) -> int:
        """Sequences in one group."""
        return max(1, self.batch // self.groups)

    @property
    def lanes(self) -> list[str]:
        """The lanes of `timeline`, in the order in which a token passes them."""
        lanes = ((f"stage {rank}", f"line {rank}-{rank + 1}") for rank in range(self.groups))
        return [lane for pair in lanes for lane in pair][:-1]

    def timeline(self, groups: int | None = None, tokens: int = 3) -> tuple[float, list[Span]]:
        """A rehearsal on paper: seconds in which each group gets another token, and what each lane does meanwhile.

        Args:
            groups: how many are under way; None: as many as stages. One group is one sequence.
            tokens: of each group.

        >>> from bigkit import plan_hosts
        >>> p = plan_hosts("llama-2-7b", ["RTX 4090", "RTX 3090"], dtype="float16")
        >>> seconds, spans = p.timeline(groups=1, tokens=1)
        >>> round(1 / seconds), [span.lane for span in spans]
        (40, ['stage 0', 'line 0-1', 'stage 1'])
        """
        groups = self.groups if groups is None else groups
        sent = self.hidden * (self.each if groups > 1 else 1)
        seconds = [stage.seconds if groups > 1 else stage.alone for stage in self.stages]
        return run_stages(seconds, self.network, sent, groups, tokens)

    @property
    def digest(self) -> str:
        """A hash of the plan, by which processes see that they follow the same one."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    def explain(self) -> str:
        """The plan in sentences, each stage's own plan included, and what to run it with."""
        lines = [f"{self.model} over {counted(len(self.stages), 'host')}, line {self.network}:"]
        slowest = max(self.stages, key=lambda stage: stage.seconds)
        for i, stage in enumerate(self.stages):
            text = f"process {i} on {stage.host}: {counted(stage.blocks, 'block')}, {stage.names[0]} .. "
            note = ", the slowest" if stage is slowest and len(self.stages) > 1 else ""
            lines.append(f"  {text}{stage.names[-1]}; a token takes {format_seconds(stage.seconds)} here{note}.")
            lines += [f"  {line}" for line in stage.plan.explain().splitlines()[1:]]
        lines += [f"  {listed(self.left_out)} would hold nothing: the others are faster without."] * bool(self.left_out)
        hop = self.network.seconds(self.hidden)
        size = format_bytes(self.hidden)
        lines.append(f"  A token's hidden states are {size}: {format_seconds(hop)} from stage to stage.")
        many = f"{max(self.batch, self.groups)} in {counted(self.groups, 'group')}: {three_figures(self.many)} tokens/s"
        lines.append(f"  One sequence: {three_figures(self.one)} tokens/s; {many}.")
        return "\n".join([*lines, *(f"  {line}" for line in commands(self))])

    __str__ = explain

    def __repr__(self) -> str:
        parts = ", ".join(f"{stage.host}: {stage.blocks}" for stage in self.stages)
        text = f"HostsPlan({self.model}, blocks {{{parts}}}, {three_figures(self.one)} tokens/s for one sequence)"
        return text if len(text) < 110 else text[:105] + "...)"

    def to_code(self) -> str:
        """Python that makes this plan again; of a model that has no name, from the variable `model`."""
        plan, known = self.stages[0].plan, NETWORKS.get(self.network.name) == self.network
        hosts = " | ".join(re.sub(r" \(as fast as [^)]*\)", "", stage.host) for stage in self.stages)
        arguments = {"dtype": plan.dtype, "quantization": plan.quantization, "batch": self.batch,
                     "context": plan.context, **plan.options}  # fmt: skip
        given = "".join(f"    {name}={value!r},\n" for name, value in arguments.items() if value is not None)
        head = "from bigkit import plan_hosts\n" + "from bigkit.machine.network import Network\n" * (not known)
        model = "model" if plan.library == "module" else repr(self.model)
        line = self.network.name if known else self.network
        return f"{head}\np = plan_hosts(\n    {model},\n    {hosts!r},\n    {line!r},\n{given})\n"

    def to_json(self) -> str:
        """The plan as JSON text; bytes and seconds."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> HostsPlan:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is not the JSON of such a plan.
        """
        try:
            data = json.loads(text)
            stages = tuple(
                Stage(**{**stage, "names": tuple(stage["names"]), "plan": Plan.from_json(json.dumps(stage["plan"]))})
                for stage in data.pop("stages")
            )
            network, left_out = Network(**data.pop("network")), tuple(data.pop("left_out"))
            return HostsPlan(network=network, stages=stages, left_out=left_out, **data)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of a bigkit HostsPlan: {error}") from error


def plan_hosts(
    model: ModelSpec,
    hosts: Sequence[Hardware | str] | str,
    network: Network | str = "Ethernet 10G",
    strategy: str = "balanced",
    *,
    dtype: object = None,
    quantization: str | None = None,
    batch: int = 1,
    context: int = 0,
    kv_dtype: object = None,
    overhead: int | str | None = None,
    **options: Any,
) -> HostsPlan:
    """Cut a model's blocks into one stage for each host.

    Args:
        model: the model's skeleton.
        hosts: the machines, in the order in which hidden states pass them; one process runs on each. See `read_hosts`.
        network: the line between them, or a name of `NETWORKS`.
        strategy: "balanced" makes the slowest stage as fast as it can be; "sequential" fills one host after the other.
        dtype, quantization, batch, context, kv_dtype, options: see `place`. `batch` are the sequences in all groups.
        overhead: bytes that the runtime takes on each GPU; None takes `overhead_of` each host.

    Raises:
        PlanError: a stage does not fit its host.
        ValueError: a model without a chain of blocks, or with several (encoder and decoder); an unknown name.

    >>> from bigkit import zoo
    >>> spec = zoo.describe("llama-2-7b")
    >>> plan_hosts(spec, ["RTX 4090", "RTX 3090"], dtype="float16").groups
    2
    """
    if strategy not in ("balanced", "sequential"):
        raise ValueError(f"unknown strategy {strategy!r}: expected balanced or sequential")
    machines, line = read_hosts(hosts), network_of(network)
    ask = {"dtype": dtype, "quantization": quantization, "batch": batch, "context": context, "kv_dtype": kv_dtype}
    precision = model.precision(dtype, quantization, options.get("keep"), options.get("special_dtypes"))
    units = chain_of_blocks(model)
    needs = [sum(layer.bytes(precision) for layer in unit) for unit in units]
    needs = [need + _kv(model, unit, batch, context, precision, kv_dtype) for need, unit in zip(needs, units)]
    reserved = [overhead_of(machine) if overhead is None else parse_bytes(overhead) for machine in machines]
    working = working_bytes(model, precision, batch, tokens_seen(model, context))
    paces = [_pace(machine, taken + working, quantization) for machine, taken in zip(machines, reserved)]
    ends = _cut(model, needs, paces, batch, strategy)
    count, used, stages = sum(end > start for start, end in zip([0, *ends], ends)), 0, []
    for machine, end, taken in zip(machines, ends, reserved):
        if end > used:
            names = [layer.name for unit in units[used:end] for layer in unit]
            asked = {**ask, **options, "overhead": taken}
            stages.append(_stage(model, names, machine, end - used, max(1, batch // count), asked))
            used = end
    width = model.facts.get("hidden_size") or 0
    hidden = width * dtype_bits(model.computes_in(precision)) // 8
    out = [machine.name for machine, start, end in zip(machines, [0, *ends], ends) if end <= start]
    found = HostsPlan(model.name, line, tuple(stages), batch, hidden, 0.0, 0.0, tuple(out))
    one, many = 1 / found.timeline(1)[0], found.groups * found.each / found.timeline()[0]
    return replace(found, one=one, many=many, split=_split(model, needs, machines, paces, line, hidden))


def _split(
    model: ModelSpec, needs: Sequence[int], machines: Sequence[Hardware], paces: Sequence[_Pace], line: Network,
    hidden: int,
) -> float | None:  # fmt: skip
    gpus = [tier for machine, pace in zip(machines, paces) for tier in pace.tiers[: len(machine.gpus)]]
    if not all(machine.gpus for machine in machines):
        return None
    if len(machines) == 1:  # they meet over their own link
        line = Network("link", machines[0].gpus[0].link, 1e-5)
    python = len(needs) / min(pace.blocks for pace in paces)
    return tokens_if_split(gpus, sum(needs), _share_read(model, 1) * sum(needs), len(needs), python, line, hidden)


def read_hosts(hosts: Sequence[Hardware | str] | str, this: Hardware | None = None) -> list[Hardware]:
    """Machines, from a list of them or of their names, or from a text.

    Args:
        hosts: as in ["RTX 4090", "2 x L4"], "RTX 4090 | 2 x L4", or "2 hosts", which are such as `this`.
        this: the machine that "hosts" are; None is this one.

    Raises:
        ValueError: there is none, or an unknown name.

    >>> [machine.name for machine in read_hosts("4090 | 2 x L4")], len(read_hosts("2 hosts", machine_of("L4")))
    (['1 x RTX 4090', '2 x L4'], 2)
    """
    named: list[Hardware | str] = []
    for host in hosts.split("|") if isinstance(hosts, str) else hosts:
        some = re.fullmatch(r"\s*(\d+) hosts?\s*", host) if isinstance(host, str) else None
        if some:
            named += [this or Hardware.detect()] * int(some[1])
        elif not isinstance(host, str) or host.strip():
            named.append(host)
    if not named:
        raise ValueError('hosts is empty: name at least one machine, as in "RTX 4090 | 2 x L4"')
    return [machine_of(host) for host in named]


def chain_of_blocks(model: ModelSpec) -> list[list[Layer]]:
    """The model's blocks, each in a list: embeddings with the first one, the output head with the last.

    All else (norms, rotary tables) is in none: it is small, nothing says when it runs, and every process keeps it.

    Raises:
        ValueError: there is not exactly one chain of blocks, or they get more than hidden states.
    """
    layers = model.layers_to_place()
    named = [layer.name.rpartition(".") for layer in layers]
    count = {parent: 0 for parent, _, own in named if own.isdigit()}
    for parent, _, own in named:
        if parent in count and own.isdigit():
            count[parent] += 1
    chains = [parent for parent in count if not any(part.isdigit() for part in parent.split("."))]
    if len(chains) != 1:
        found = f"{len(chains)} chains of blocks ({listed(chains)})" if chains else "no chain of blocks"
        hint = "one process after another can run a decoder only; place it on one host with bigkit.plan"
        raise ValueError(f"{model.name} has {found}: {hint}")
    if fed := [layer.name for layer in layers if "per_layer" in layer.name.rpartition(".")[2]]:  # Gemma 4's small ones
        hint = "only hidden states go from host to host; place it on one host with bigkit.plan"
        raise ValueError(f"{model.name} feeds every block from {fed[0]}: {hint}")
    units = [[layer] for layer, (parent, _, own) in zip(layers, named) if parent == chains[0] and own.isdigit()]
    inside = {layer.name for unit in units for layer in unit}
    for layer in layers:
        if layer.name not in inside and "Embedding" in layer.cls and "weight" in layer.spec.tensors:
            units[0].insert(len(units[0]) - 1, layer)
        elif layer.spec.linear and _is_head(model, layer):
            units[-1].append(layer)
    return units


def _is_head(model: ModelSpec, layer: Layer) -> bool:
    """Whether a linear layer outside of all blocks gives the logits."""
    if any(part.isdigit() for part in layer.name.split(".")):
        return False
    return "." not in layer.name or layer.spec.tensors["weight"].shape[0] == model.facts.get("vocab_size")


def part_of(model: ModelSpec, names: Iterable[str]) -> ModelSpec:
    """The model with the parameters of these modules alone."""
    kept = {*names}
    left_out = {layer.name for unit in chain_of_blocks(model) for layer in unit} - kept

    def prune(module: ModuleSpec, name: str) -> ModuleSpec:
        parts = {own: (f"{name}.{own}" if name else own) for own in module.children}
        children = {o: prune(module.children[o], full) for o, full in parts.items() if full not in left_out}
        same = len(children) == len(parts) and all(children[own] is module.children[own] for own in parts)
        return module if name in kept or same else replace(module, children=children)

    root = prune(model.root, "")
    tensors = {name for name, _, _ in root.named_tensors()}
    ties = (tuple(name for name in group if name in tensors) for group in model.ties)
    attention = tuple(record for record in model.attention if kept.intersection(prefixes(record.layer)))
    last = chain_of_blocks(model)[-1][-1].name in kept
    facts = {
        **model.facts,
        "has_head": model.facts.get("has_head", True) and last,
        "num_hidden_layers": sum(name.rpartition(".")[2].isdigit() for name in kept),
    }
    return replace(model, root=root, ties=tuple(t for t in ties if len(t) > 1), attention=attention, facts=facts)


def _stage(
    model: ModelSpec, names: Sequence[str], machine: Hardware, blocks: int, each: int, ask: dict[str, Any]
) -> Stage:
    part = part_of(model, names)
    try:
        plan = place(part, machine.max_memory(), **ask)
    except PlanError as error:
        raise PlanError(replace(error.plan, problem=f"on {machine.name}, {error.plan.problem}"), error.cure) from None

    def seconds(batch: int) -> float:
        """Of a token of so many of the sequences."""
        shares = (replace(share, kv_cache=share.kv_cache * batch // plan.batch) for share in plan.shares)
        fewer = replace(plan, batch=batch, shares=tuple(shares))
        return predict(part, fewer, machine, calibration_of(machine)).seconds

    return Stage(machine.name, tuple(names), blocks, plan, seconds(each), seconds(1))


def _kv(model: ModelSpec, unit: Sequence[Layer], batch: int, context: int, precision: Any, kv_dtype: Any) -> int:
    names, dtype = {layer.name for layer in unit}, model.computes_in(precision)
    records = [record for record in model.attention if names.intersection(prefixes(record.layer))]
    return batch * sum(record.bytes(context, dtype, kv_dtype) for record in records)


class _Pace(NamedTuple):
    """What a host goes through in a second: (bytes, bytes a second) of its memories, fastest first, and blocks."""

    tiers: list[tuple[int, float]]
    blocks: float

    def room(self, seconds: float, share: float) -> int:
        """Bytes that it can hold and go through in so many seconds, if a share of them is read."""
        total = 0.0
        for size, rate in self.tiers:
            taken = min(size, seconds * rate / share)
            total, seconds = total + taken, seconds - taken * share / rate
        return int(total)


def _pace(machine: Hardware, reserved: int, quantization: str | None) -> _Pace:
    rates, budgets = all_rates(machine, calibration_of(machine)), machine.max_memory()
    gpus = [gpu for gpu in budgets if gpu not in ("cpu", "disk")]
    first = rates[gpus[0] if gpus else "cpu"]
    tiers = [(max(0, budgets[gpu] - reserved), rates[gpu].memory) for gpu in gpus]
    tiers += [(budgets["cpu"], sum(rates[gpu].link for gpu in gpus) or first.memory)] if "cpu" in budgets else []
    return _Pace([*tiers, (budgets["disk"], machine.disk_rate)], 1 / (ASSUMED.steps[quantization] * first.issue))


def _share_read(model: ModelSpec, batch: int) -> float:
    """Of the weights, for a token of each sequence."""
    routed = sum(experts.parameters for experts in experts_of(model)) / max(1, model.parameters)
    return 1 - routed * (1 - picked(model, batch))


def _cut(model: ModelSpec, needs: Sequence[int], paces: Sequence[_Pace], batch: int, strategy: str) -> list[int]:
    """Where each host's stretch ends: the smallest time of the slowest for which all blocks find room."""
    share, chain = _share_read(model, batch), Chain(needs)

    def ends(microseconds: int, leave: bool = False) -> list[int]:
        rooms = [pace.room(microseconds / 1e6, share) for pace in paces]
        counts = [int(pace.blocks * microseconds / 1e6) for pace in paces]
        able = [leave and count > 0 and room >= max(needs) for room, count in zip(rooms, counts)]
        found, start = [], 0
        for k, (room, count) in enumerate(zip(rooms, counts)):  # who is able gets a block, though others could do it
            start = min(chain.reach([room], start)[0], start + count, max(start, len(needs) - sum(able[k + 1 :])))
            found.append(start)
        return found

    longest = 10**12
    if ends(longest)[-1] < len(needs):
        return [*ends(longest)[:-1], len(needs)]  # `place` says on the last host what is missing
    if strategy == "sequential":
        return ends(longest)
    return ends(last_true(lambda time: ends(time)[-1] < len(needs), 0, longest) + 1, leave=True)
