"""The picture of a plan over hosts, with its text twin: what each host holds, what goes over the line, who works when.

Leaves out: the layers within a stage (`draw/plan.py` draws each stage's own plan), and controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..devices import device_label
from ..machine.streams import Span
from ..maps.hosts import HostsPlan, Stage
from ..units import counted, format_bytes, format_seconds, listed, text_table, three_figures
from .bars import HATCHES, PART_COLOURS, draw_bars
from .canvas import ABOVE, GROUND, WIDTH, Picture, time_unit
from .colours import GPU_COLOURS, PURPLE, SOFT, TRACK
from .plan import PARTS, plan_bar, plan_settings

LANE = 15  # points from one lane of the timeline to the next
TOKENS = 4  # of each group that the timeline shows


def hosts_figure(plan: HostsPlan) -> Picture:
    """A plan over hosts as a picture: for each process the bars of its GPUs, and between two the line and its bytes.

    Below: what each process and each line does while one sequence, and then as many groups as there are processes, get
    their tokens. All bars share one scale, and so do the two timelines.

    >>> from bigkit import plan_hosts
    >>> hosts_figure(plan_hosts("llama-2-7b", "4090 | L4", dtype="float16"))
    <Picture: llama-2-7b over 2 hosts: 22 blocks on 1 x RTX 4090, 10 blocks on 1 x L4. One sequence: 29.8 tokens/s.>
    """
    picture = Picture(plan.model, hosts_label(plan), left=62)
    picture.head(f"{plan_settings(plan.stages[0].plan)}, line {plan.network}")
    picture.legend(_legend(plan), HATCHES)
    working = [[share for share in stage.plan.shares if share.runs] for stage in plan.stages]
    longest = max(max(share.used, share.budget or 0) for shares in working for share in shares)
    for rank, (stage, shares) in enumerate(zip(plan.stages, working)):
        picture.heading(f"Process {rank}, {stage_text(plan, rank)}")
        bars = [plan_bar(stage.plan, share) for share in shares]
        draw_bars(picture, [replace(bar, key=f"process:{rank}:{bar.key}") for bar in bars], longest)
        if away := _away(stage):
            picture.y -= 4
            picture.heading(f"{away}, and travels for each token.")
        if rank < len(plan.stages) - 1:
            _draw_line(picture, plan, rank)
    _draw_time(picture, plan)
    return picture


def hosts_text(plan: HostsPlan) -> str:
    """The text twin of `hosts_figure`.

    >>> from bigkit import plan_hosts
    >>> print(hosts_text(plan_hosts("gpt2", ["L4", "L4"])).splitlines()[0])
    gpt2 over 2 hosts: 6 blocks on 1 x L4, 6 blocks on 1 x L4. One sequence: 106 tokens/s.
    """
    rows = [
        [str(rank), stage.host, str(stage.blocks), f"{stage.names[0]} .. {stage.names[-1]}",
         " + ".join(f"{device_label(s.device)} {format_bytes(s.used)}" for s in stage.plan.shares if s.runs),
         _away(stage) or "-", format_seconds(stage.seconds)]
        for rank, stage in enumerate(plan.stages)
    ]  # fmt: skip
    table = text_table(["process", "host", "blocks", "modules", "holds", "elsewhere", "a token"], rows)
    lines = [_hop_text(plan), *(_pace_text(plan, groups) for groups in dict.fromkeys((1, plan.groups)))]
    if plan.split:
        lines.append(f"Every layer split over all GPUs instead: {three_figures(plan.split)} tokens/s for one sequence")
    left = [f"{listed(plan.left_out)} would hold nothing: the others are faster without."] * bool(plan.left_out)
    return "\n".join([hosts_label(plan), plan_settings(plan.stages[0].plan), "", table, "", *lines, *left])


def hosts_label(plan: HostsPlan) -> str:
    """One sentence for those who cannot see the picture of a plan over hosts."""
    parts = ", ".join(f"{counted(stage.blocks, 'block')} on {stage.host}" for stage in plan.stages)
    over = f"{plan.model} over {counted(len(plan.stages), 'host')}"
    return f"{over}: {parts}. One sequence: {three_figures(plan.one)} tokens/s."


def stage_text(plan: HostsPlan, rank: int) -> str:
    """What one process does, in a sentence without its beginning."""
    stage = plan.stages[rank]
    slowest = all(stage.seconds > 1.01 * other.seconds for other in plan.stages if other is not stage)
    took = f"{format_seconds(stage.seconds)} for a token{', the slowest' * (slowest and plan.groups > 1)}"
    return f"{stage.host}: {counted(stage.blocks, 'block')}, {took}"


def hosts_differences(old: HostsPlan, new: HostsPlan) -> list[str]:
    """How a plan over hosts differs from another, in sentences; none if nothing does."""

    def facts(plan: HostsPlan) -> dict[str, str]:
        blocks = {
            f"Process {rank} has": f"{counted(stage.blocks, 'block')} on {stage.host}"
            for rank, stage in enumerate(plan.stages)
        }
        paces = {"One sequence gets": f"{three_figures(plan.one)} tokens/s",
                 "All together get": f"{three_figures(plan.many)} tokens/s"}  # fmt: skip
        about = {"It is": f"{plan.model}, {plan_settings(plan.stages[0].plan)}", "The line is": str(plan.network)}
        return {**about, **blocks, **paces}

    one, other = facts(old), facts(new)
    names = dict.fromkeys([*one, *other])
    pairs = [(name, one.get(name, "nothing"), other.get(name, "nothing")) for name in names]
    return [f"{name} {now} (before: {before})." for name, before, now in pairs if before != now]


def _legend(plan: HostsPlan) -> list[tuple[str, str | Sequence[str]]]:
    shares = [share for stage in plan.stages for share in stage.plan.shares if share.runs]
    most = max(sum(share.runs for share in stage.plan.shares) for stage in plan.stages)
    entries: list[tuple[str, str | Sequence[str]]] = [("weights, by device", GPU_COLOURS[:most])]
    for part, name in PARTS.items():
        if part != "weights" and any(getattr(share, part) for share in shares):
            entries.append((name, PART_COLOURS[name]))
    return [*entries, ("on the line", PURPLE)]


def _away(stage: Stage) -> str:
    """What rests in RAM and on disk."""
    shares = [share for share in stage.plan.shares if share.weights and not share.runs]
    texts = (f"{format_bytes(own.weights)} rests {'in RAM' if own.device == 'cpu' else 'on disk'}" for own in shares)
    return " and ".join(texts)


def _hop_text(plan: HostsPlan) -> str:
    sent, took = format_bytes(plan.hidden), format_seconds(plan.network.seconds(plan.hidden))
    return f"{plan.network.name}: {sent} of hidden states for a token of one sequence, {took}; 8 bytes come back."


def _pace_text(plan: HostsPlan, groups: int) -> str:
    if groups == 1:
        return f"One sequence: a token every {format_seconds(1 / plan.one)}, {three_figures(plan.one)} tokens/s"
    every = format_seconds(plan.each * groups / plan.many)
    asked = f"{counted(plan.each * groups, 'sequence')} in {groups} groups: a token of each every {every}"
    return f"{asked}, {three_figures(plan.many)} tokens/s"


def _draw_line(picture: Picture, plan: HostsPlan, rank: int) -> None:
    """The line from one host to the next: an arrow, and what goes along it."""
    x, top, bottom = 24.0, picture.y - 6, picture.y + 8
    picture.line(f"line {rank}", [(x, top), (x, bottom)], PURPLE, 2)
    picture.line("tip", [(x - 5, bottom - 2), (x + 5, bottom - 2), (x, bottom + 6)], PURPLE)
    text = _hop_text(plan)
    picture.text(36, picture.y + 3, text, 9, SOFT)
    picture.mark(f"line:{rank}", f"From process {rank} to {rank + 1}, {text}", x - 8, top, WIDTH - x, bottom - top + 6)
    picture.y += 18


def _draw_time(picture: Picture, plan: HostsPlan) -> None:
    """What each process and each line does: for one sequence, and for as many groups as there are processes."""
    runs = {groups: plan.timeline(groups, TOKENS) for groups in dict.fromkeys((1, plan.groups))}
    longest = max(span.end for _, spans in runs.values() for span in spans) or 1e-9
    unit, unit_name = time_unit(longest)
    top = picture.y
    for groups, (seconds, spans) in runs.items():
        picture.heading(_pace_text(plan, groups))
        for lane in plan.lanes:
            _draw_lane(picture, lane, [span for span in spans if span.lane == lane], longest, seconds)
        picture.y += 6
    picture.y -= 6
    picture.axis(longest / unit, unit_name, top + 20)


def _draw_lane(picture: Picture, lane: str, spans: Sequence[Span], longest: float, seconds: float) -> None:
    """One lane: a bar for each group's turn, in the group's colour."""
    scale, name = picture.room / longest, lane.replace("stage", "process")
    picture.text(picture.left - 6, picture.y + LANE / 2, name, 8.5, anchor="end")
    picture.box("track", picture.left, picture.y + 2, picture.room, LANE - 4, TRACK, depth=GROUND)
    for span in spans:
        x, width = picture.left + span.start * scale, (span.end - span.start) * scale
        colour = PURPLE if lane.startswith("line") else GPU_COLOURS[span.turn % 3]
        picture.box(lane, x, picture.y + 2, max(width, 0.8), LANE - 4, colour, depth=ABOVE)
        picture.label_in(x, picture.y + LANE / 2, width, (f"g{span.turn}",), 8, colour, margin=2)
        says = f"{name}: {span.name}, token {span.token}, {format_seconds(span.start)} to {format_seconds(span.end)}."
        picture.mark(f"span:{lane}:{span.turn}:{span.token}", says, x, picture.y, max(width, 0.8), LANE)
    groups = len({span.turn for span in spans})
    work = groups * (spans[0].end - spans[0].start) / seconds
    picture.text(WIDTH - 8, picture.y + LANE / 2, f"busy {100 * work:.0f} %", 8.5, SOFT, "end")
    picture.y += LANE
