"""What a token waits for under a plan, from sizes and rates alone.

Four things work side by side, and the slowest counts; but experts are copied when they are chosen, and then what works
on them waits:

    Python      issues a number of steps for each block, most where bitsandbytes multiplies
    GPU         reads the weights that rest on it and the KV cache; of experts, those that the router picks; what is
                stored in few bits is decoded, which writes and reads it in 16 bit
    link        copies what rests in RAM and on disk: whole blocks, but of experts those that the router picks
    disk        reads what rests there, likewise

Several GPUs work one after another. No model is built and nothing is traced: 600 B parameters take as long as one.
`dry_run` checks a plan.

Leaves out: tensor parallelism, and what quantized kernels cost beyond the bytes they read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..devices import Device
from ..machine.hardware import GPUS, Hardware
from ..machine.ledger import Calibration
from ..machine.roofline import Rates
from ..model.estimate import generates
from ..model.experts import experts_of, visited
from ..model.spec import ModelSpec
from ..model.stored import decoded_bytes
from ..units import dtype_bits, format_bytes, format_seconds, three_figures
from .draft import Speculation
from .plan import Plan

LOSS = {None: 0, "int8": 1, "nf4": 2, "fp4": 3, "nf4-double": 3, "fp4-double": 4}  # rank: how far from the 16-bit model
WAITS = {  # lane -> what is waited for there, in words
    "Python": "Python, which starts the work of each layer", "GPU": "the GPU's own memory",
    "RAM": "the CPU and its RAM", "link": "weights that come over the link", "disk": "weights that come from disk",
}  # fmt: skip
COPIES = ("link", "disk")
CHOSEN = 0.95  # if more of a block's experts are picked, all are streamed, the next block's while one works


@dataclass(frozen=True)
class Assumed:
    """What `advise` counts with where neither `Rates` nor this machine's ledger has a figure.

    Args:
        steps: quantization -> steps of Python for one block (see `Operation.issued`). Counted in dry runs of a Llama;
            GPT-2 has 70 where Llama has 130.
        cpu: operations a second of a CPU's matrix products. An order of magnitude, not measured.
    """

    steps: Mapping[str | None, int] = field(default_factory=lambda: {
        None: 130, "int8": 330, "nf4": 160, "fp4": 160, "nf4-double": 160, "fp4-double": 160})  # fmt: skip
    cpu: float = 1e11


ASSUMED = Assumed()


@dataclass(frozen=True)
class Option:
    """One way to run a model: a plan, and what it costs.

    Args:
        plan: which layer rests on which device.
        token: predicted seconds for one token of each sequence; None for a model that does not generate.
        prefill: predicted seconds for one pass over the whole context, or over an image.
        waits: "Python", "GPU" (or "RAM"), "link", "disk" -> predicted seconds that it works for a token (or the pass).
        loss: rank of the loss of quality by quantization; 0 is none.
        front: whether it is more exact than every option that is better by the target.
        speculation: what a draft brings, if one was asked about.
    """

    plan: Plan
    token: float | None
    prefill: float
    waits: dict[str, float]
    loss: int
    front: bool = False
    speculation: Speculation | None = None

    @property
    def seconds(self) -> float:
        """What is waited for: a token, or the pass of a model that does not generate."""
        return self.prefill if self.token is None else self.token

    @property
    def speed(self) -> str:
        """The same in words: "12.3 tokens/s" of all sequences together, or "45.6 ms a pass"."""
        if self.token is None:
            return f"{format_seconds(self.prefill)} a pass"
        return f"{three_figures(self.plan.batch / self.token)} tokens/s"

    @property
    def pace(self) -> str:
        """The speed, or "14.2 s a token" where there is less than one a second."""
        slow = self.token is not None and self.token > self.plan.batch
        return f"{format_seconds(self.seconds / self.plan.batch)} a token" if slow else self.speed

    @property
    def label(self) -> str:
        """How the weights are stored."""
        return self.plan.stored

    @property
    def fit(self) -> str:
        """Whether it fits, in words: "Fits", or "Fits with 13.16 GiB in RAM"."""
        away = [f"{format_bytes(share.weights)} {'in RAM' if share.device == 'cpu' else 'on disk'}"
                for share in self.plan.shares if share.weights and not share.runs]  # fmt: skip
        return " ".join(["Fits", *(["with", " and ".join(away)] if away else [])])

    @property
    def bottleneck(self) -> str:
        """What is waited for longest."""
        return max(self.waits, key=lambda lane: self.waits[lane])

    @property
    def reason(self) -> str:
        """What is waited for longest, in a sentence."""
        return f"A {'pass' if self.token is None else 'token'} waits for {WAITS[self.bottleneck]}."

    @property
    def memory(self) -> int:
        """Bytes on all devices, those where weights only rest included."""
        return sum(share.used for share in self.plan.shares)


def rates_of(hardware: Hardware, calibration: Calibration | None) -> list[Rates]:
    """The rates of each GPU: measured, else the vendors'."""
    if calibration is None:
        return [Rates.of_gpu(gpu, hardware.disk_rate) for gpu in hardware.gpus]
    rates = [Rates.of_calibration(calibration, gpu, hardware.disk_rate) for gpu in hardware.gpus]
    together = calibration.links if len(calibration.links) == len(rates) > 1 else [rate.link for rate in rates]
    return [replace(rate, link=link) for rate, link in zip(rates, together)]


def all_rates(hardware: Hardware, calibration: Calibration | None) -> dict[Device, Rates]:
    """The rates of every device that may run layers, the CPU among them."""
    cpu = replace(
        Rates.of_gpu(GPUS["A100-80GB"], hardware.disk_rate),
        memory=hardware.ram_rate,
        products={"float32": ((1, ASSUMED.cpu),)},
    )
    if calibration:
        measured: dict[str, Any] = {
            "memory": calibration.host_memory, "products": calibration.products, "issue": calibration.issue,
            "disk": calibration.disk_warm,
        }  # fmt: skip
        cpu = replace(cpu, **{name: value for name, value in measured.items() if value})
    return {"cpu": cpu, **dict(zip(hardware.max_memory(), rates_of(hardware, calibration)))}


def predict(model: ModelSpec, plan: Plan, hardware: Hardware, calibration: Calibration | None) -> Option:
    """What a token and a prompt take under a plan."""
    rates = all_rates(hardware, calibration)
    runners = [share for share in plan.shares if share.runs]
    first = rates[runners[0].device]
    on_gpus = runners[0].device != "cpu"
    precision = model.precision(plan.dtype, plan.quantization)
    bits = dtype_bits(model.computes_in(precision))
    blocks = max(1, model.facts.get("num_hidden_layers") or len({record.layer for record in model.attention}))
    routed_share = sum(experts.parameters for experts in experts_of(model)) / max(1, model.parameters)
    flops = 2 * plan.batch * (model.parameters - (1 - picked(model, 1)) * routed_share * model.parameters)
    total = max(1, sum(share.weights for share in plan.shares))
    on_disk = sum(share.weights for share in plan.shares if share.device == "disk")
    visits, decoded = visitors(plan), 2 * decoded_bytes(model, precision)  # written, and read by the product

    def chosen(tokens: int) -> bool:
        """Whether of some experts only the chosen ones travel."""
        return bool(visits) and plan.experts is not None and picked(model, plan.batch * tokens) < CHOSEN

    def lanes(tokens: int) -> dict[str, float]:
        """Lane -> seconds that it works when each sequence brings so many tokens."""
        used = 1 - (1 - picked(model, plan.batch * tokens)) * routed_share  # share of the weights that are read
        reading = computing = 0.0
        for share in runners:
            rate = rates[share.device]
            weights = share.weights + visits.get(share.device, 0)
            reading += (used * (weights + decoded * weights / total) + share.kv_cache) / rate.memory
            product = rate.table("bfloat16" if bits == 16 else "float32")[-1][1]
            computing += weights / total * tokens * flops / product
        travels = picked(model, plan.batch * tokens) if plan.experts else 1.0  # of experts apart, the chosen ones
        copies = [size / rates[gpu].link for gpu, size in visits.items()]
        return {
            "Python": ASSUMED.steps[plan.quantization] * blocks * first.issue,
            "GPU" if on_gpus else "RAM": max(reading, computing),
            "link": travels * (sum(copies) if chosen(tokens) else max(copies, default=0.0)),
            "disk": travels * on_disk / first.disk,
        }

    if model.library == "gguf":
        return _by_llama_cpp(plan, lanes, sum(visits.values()) * picked(model, plan.batch), rates["cpu"])

    def seconds(tokens: int) -> float:
        """What is waited for: the slowest lane, and for chosen experts, since nothing of them can be fetched ahead."""
        waits = lanes(tokens)
        if not chosen(tokens):
            return max(waits.values())
        return max(value for lane, value in waits.items() if lane not in COPIES) + sum(waits[lane] for lane in COPIES)

    whole = max(plan.context, 1)
    if not generates(model):
        return Option(plan, None, seconds(whole), lanes(whole), LOSS[plan.quantization])
    return Option(plan, seconds(1), seconds(whole), lanes(1), LOSS[plan.quantization])


def _by_llama_cpp(plan: Plan, lanes: Callable[[int], dict[str, float]], away: float, cpu: Rates) -> Option:
    """What llama.cpp takes: the CPU reads what rests in RAM, `away` bytes for a token, while the GPU waits. A prompt's
    layers are copied to the GPU.
    """
    token, prompt = lanes(1), lanes(max(plan.context, 1))
    waits = {"GPU": token.get("GPU", 0.0), "RAM": token.get("RAM", 0.0) + away / cpu.memory, "disk": token["disk"]}
    del prompt["Python"]
    return Option(plan, sum(waits.values()), max(prompt.values()), waits, LOSS[plan.quantization])


def visitors(plan: Plan) -> dict[Device, int]:
    """GPU -> bytes of weights that visit it for each pass, those of a tied tensor once."""
    visits = Counter[Device | None]()
    for layer in plan.layers:
        if layer.works not in (None, "cpu"):
            visits[layer.works] += layer.bytes
    total = sum(visits.values())
    return {gpu: plan.offloaded * size // total for gpu, size in visits.items() if size and gpu is not None}


def picked(model: ModelSpec, tokens: int) -> float:
    """The share of the routed experts that some of so many tokens visit; 1 in a model without experts."""
    experts = model.facts.get("num_experts")
    return visited(tokens, model.facts.get("experts_per_token", 1), experts) if experts else 1.0
