"""From a name to a model: its record, or the module itself without memory.

    >>> from bigkit import zoo
    >>> spec = zoo.describe("llama-2-7b")                # no torch, no network: a table of a few kilobytes
    >>> spec.parameters, [layer.name for layer in spec.layers()][:2]
    (6738415616, ['model.embed_tokens', 'model.layers.0'])

A name is looked up in this order:

    1. a shipped model, by short name, Hub id or alias, in any case; no torch, no network
       ("llama-2-7b", "meta-llama/Llama-2-7b-hf", "https://huggingface.co/meta-llama/Llama-2-7b-hf/tree/main")
    2. a local folder with config.json, or with safetensors files alone ("./gpt2" where "gpt2" is shipped); a GGUF file
    3. a timm model ("resnet18", "resnet18.a1_in1k", "timm/resnet18", "hf-hub:timm/resnet18.a1_in1k")
    4. a Hub id or URL: its config.json; where that tells nothing, the headers of its safetensors files

A revision other than "main" is asked of the Hub even if the model is shipped. A config is enough: the model's own
classes are built under `init_empty_weights`, which gives every shape and no memory, and `meta/skeleton.py` reads them.
By hand, with Transformers:

    config = AutoConfig.from_pretrained("openai-community/gpt2")   # a file of one kilobyte
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}

Reading order:

    resolve.py    `describe` and `empty_model`: the four steps above
    catalog.py    the models that ship, and their layer tables as JSON
    build.py      from a config to the real classes of Transformers, timm or bigkit
    hub.py        Hub ids, URLs, folders, and their config.json
    fetch.py      so many bytes and seconds from the Hub, and not one more
    headers.py    a model known by the headers of its weights alone
    gguf.py       a model known by the header of its GGUF file
    pipelines.py  pipelines of Diffusers: a class and a config for each component
    errors.py     what can go wrong, one class each
    gpt.py        a GPT of 8 million parameters whose weights ship, to run everything on

Leaves out: weights (`checkpoints/`); those of `pygpt` are loaded by `bigkit.zoo.gpt.load_pygpt`, those of the mixture
`pymoe` by Transformers' `from_pretrained(bigkit.zoo.gpt.PYMOE)`.
"""

from .catalog import ENTRIES, Entry, names
from .errors import BadURL, GatedModel, NoConfig, OfflineError, RemoteCodeNeeded, UnknownModel, ZooError
from .resolve import describe, empty_model, stored_tensors

__all__ = [
    "ENTRIES", "BadURL", "Entry", "GatedModel", "NoConfig", "OfflineError", "RemoteCodeNeeded", "UnknownModel",
    "ZooError", "describe", "empty_model", "names", "stored_tensors",
]  # fmt: skip
