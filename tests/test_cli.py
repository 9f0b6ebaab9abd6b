"""The command line, as a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigkit import describe, zoo
from bigkit.cli import main
from bigkit.machine.hardware import HARDWARE


def run(*arguments):
    code = (
        "import sys; from bigkit.cli import main; status = main();"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_estimate_prints_the_table_without_torch():
    done = run("estimate-memory", "bert-base-cased")
    assert done.returncode == 0 and done.stderr == "False\n"
    assert "413.18 MB" in done.stdout and "1.61 GB" in done.stdout


def test_estimate_json(capsys):
    assert main(["estimate-memory", "resnet50.a1_in1k", "--dtypes", "float32", "bf16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["dtype"] for row in data["rows"]] == ["float32", "bfloat16"]


def test_plan_text_json_and_code(capsys):
    budgets = ["--max_memory", "0=24GiB", "1=24GiB", "cpu=64GiB"]
    assert main(["plan", "llama-2-7b", *budgets, "--dtype", "float16", "--strategy", "exact"]) == 0
    assert "Every device is within its budget." in capsys.readouterr().out
    assert main(["plan", "llama-2-7b", *budgets, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "llama-2-7b"
    assert main(["plan", "llama-2-7b", *budgets, "--code"]) == 0
    assert "from bigkit import plan" in capsys.readouterr().out


def test_plan_for_a_machine_has_its_budgets_and_overhead(capsys):
    assert main(["plan", "llama-2-70b", "--hardware", "1 x RTX 4090", "--dtype", "float16", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert shares[0]["budget"] == 24564 * 2**20 and shares[0]["overhead"] == HARDWARE["1 x RTX 4090"].overhead
    apart = ["plan", "mixtral-8x7b", "--max_memory", "0=80GiB", "cpu=80GiB", "--dtype", "float16"]
    assert main([*apart, "--experts-on-cpu", "9"]) == 0 and "--n-cpu-moe 9" in capsys.readouterr().out
    assert main(["plan", "gpt2", "--hardware", "PS5"]) == 2
    assert "unknown hardware 'PS5'" in capsys.readouterr().err


def test_a_reader_who_closes_the_pipe_is_no_error():
    code = "import sys, time; time.sleep(1); from bigkit.cli import main; sys.exit(main())"
    asked = [sys.executable, "-c", code, "plan", "gpt2", "--max_memory", "0=1GiB"]
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    process.stderr.close()


def test_a_dry_run_builds_the_model_that_was_planned(monkeypatch, capsys):
    from bigkit import zoo

    asked = []
    for name in ("describe", "empty_model"):
        real = getattr(zoo, name)
        monkeypatch.setattr(zoo, name, lambda model, library=None, real=real, **options: asked.append(
            (library, options["trust_remote_code"])) or real(model, library, **options))  # fmt: skip
    command = ["dry-run", "pygpt", "--hardware", "T4", "--context", "32", "--new", "1", "--library_name", "bigkit",
               "--trust_remote_code", "--json"]  # fmt: skip
    assert main(command) == 0
    assert asked == [("bigkit", True)] * 2 and json.loads(capsys.readouterr().out)["model"] == "pygpt"


def test_dry_run_text_json_and_picture(capsys):
    asked = ["dry-run", "gpt2", "--hardware", "2 x T4", "--dtype", "float16", "--context", "64", "--new", "1"]
    assert main(asked) == 0
    assert "Every device is within its budget." in (said := capsys.readouterr().out) and "tokens/s" in said
    assert main([*asked, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["devices"]) == {"0", "1"}
    assert main([*asked, "--svg", "--max_memory", "0=8GiB"]) == 0
    assert capsys.readouterr().out.startswith("<svg")


def test_advise_needs_no_torch(capsys):
    done = run("advise", "deepseek-v3", "--hardware", "8 x H100-80GB")
    assert done.returncode == 0 and done.stderr == "False\n" and "waits for" in done.stdout
    assert main(["advise", "llama-2-7b", "--hardware", "T4", "--target", "quality", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"][0]["stored"] == "float16"


def test_pictures_go_to_a_file(capsys, tmp_path):
    path = tmp_path / "picture.svg"
    for asked in (
        ["plan", "llama-2-7b", "--max_memory", "0=24GiB", "--dtype", "float16"],
        ["dry-run", "pygpt", "--hardware", "T4", "--context", "32", "--new", "1"],
        ["advise", "llama-2-7b", "--hardware", "T4"],
    ):
        path.unlink(missing_ok=True)
        assert main([*asked, "--svg", str(path)]) == 0
        assert capsys.readouterr().out == f"the picture is in {path}\n"
        assert path.read_text().startswith("<svg") and 'role="img"' in path.read_text()
        assert main([*asked, "--svg"]) == 0 and capsys.readouterr().out.startswith("<svg")
        assert main([*asked, "--svg", str(tmp_path / "no" / "folder.svg")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_quantized_dry_run(capsys):
    pytest.importorskip("bitsandbytes")
    asked = ["dry-run", "gpt2", "--hardware", "T4", "--context", "32", "--new", "1", "--json"]
    assert main(asked) == 0
    whole = json.loads(capsys.readouterr().out)["devices"]["0"]["at_peak"]["weights"]
    assert main([*asked, "--quantization", "nf4"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["0"]["at_peak"]["weights"] < 0.4 * whole


def test_calibrate_keeps_what_it_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setattr("bigkit.measure.calibrate.BLOCK", 2**24)
    assert main(["calibrate", "--folder", str(tmp_path)]) == 0
    assert "RAM" in (said := capsys.readouterr().out) and "ledger.json" in said
    assert main(["calibrate", "--folder", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disk_warm"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dry-run", "gpt2", "--hardware", "no such GPU"], "unknown hardware 'no such GPU'"),
        (["dry-run", "gpt2", "--hardware", "Binder"], "Binder has no GPU"),
        (["plan", "gpt2", "--max_memory", "24GiB"], "DEVICE=SIZE"),
        (["plan", "gpt2", "--max_memory", "gpu=1GB"], "unknown device 'gpu'"),
        (["plan", "llama-2-7b", "--max_memory", "0=1MB", "disk=0"], "does not fit"),
        (["estimate-memory", "gpt2", "--dtypes", "float12"], "unknown dtype"),
        (["estimate-memory", "no-such-model-at-all"], "no-such-model-at-all"),
    ],
)
def test_errors_are_one_line_and_status_two(arguments, says, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("bigkit: ")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("--num-processes 2", "--nproc-per-node 2"),
        ("--multi_gpu --num_processes 2 --same-network", "--nproc-per-node 2"),
        ("--mixed_precision no --rdzv_backend static", "--nproc-per-node"),
        ("--use_cpu", "BIGKIT_USE_CPU=1"),
        ("--use-cpu --num-cpu-threads-per-process 3", "OMP_NUM_THREADS=3"),
    ],
)
def test_options_of_accelerates_command_line(options, shown, capsys):
    from bigkit.cli import main

    assert main(["launch", "--show", *options.split(), "script.py", "--its-own", "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert shown in printed and printed.endswith("script.py --its-own --use_cpu\n")


def test_models_lists_what_ships_and_needs_no_torch():
    done = run("models")
    assert done.returncode == 0 and done.stderr == "False\n"
    assert {"pygpt", "gpt-oss-20b", "kimi-k2"} <= {line.split()[0] for line in done.stdout.splitlines()}
    done = run("models", "mixture", "Mamba")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["nemotron-3-nano-30b"]
    assert run("models", "no-such-word").returncode == 2


def test_dtype_of_the_cache(capsys):
    assert main(["estimate-memory", "llama-2-7b", "--kv_dtype", "int4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_dtype"] == "int4"
    assert main(["plan", "llama-2-7b", "--hardware", "RTX 4090", "--kv-dtype", "float8", "--code"]) == 0
    assert "kv_dtype='float8'" in capsys.readouterr().out
    assert main(["advise", "llama-2-7b", "--hardware", "RTX 4090", "--kv-dtype", "float8"]) == 0
    assert "KV cache in float8" in capsys.readouterr().out


PYGPT = str(Path(zoo.__file__).parent / "pygpt")
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "timm", "safetensors", "ipywidgets", "tqdm", "cloudpickle")))
import bigkit, bigkit.widgets
from bigkit.cli import main
for line in sys.argv[1:]:
    print(main(line.split()), flush=True)
for thing, name in ((bigkit, "dispatch_model"), (bigkit.widgets, "PlanExplorer")):
    try:
        getattr(thing, name)
    except ImportError as error:
        print(error)
"""


def test_what_needs_no_torch_runs_without_it_and_the_rest_says_what_to_install():
    """A bare `pip install bigkit` brings no torch: plans and advice work, of folders too."""
    lines = ["advise qwen3-32b --hardware L4", "plan gpt2 --max_memory 0=1GiB", f"estimate-memory {PYGPT}", "env",
             "plan gpt2", "dry-run gpt2 --hardware L4"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *lines], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert [line for line in said if line in ("0", "2")] == ["0", "0", "0", "0", "2", "2"]
    hint = "pip install 'bigkit[torch]'"
    assert said[-2:] == [f"{what}, which is not installed: {hint}" for what in
                         ("bigkit.dispatch_model needs torch", "widgets.PlanExplorer needs ipywidgets")]  # fmt: skip
    machine, command = done.stderr.splitlines()
    assert machine.startswith("bigkit: only torch knows which GPUs") and machine.endswith(hint)
    assert command == f"bigkit: this command needs torch, which is not installed: {hint}"


def test_a_folder_has_the_same_size_with_and_without_torch():
    code = "import sys; sys.modules['torch'] = None; from bigkit import zoo; print(zoo.describe(sys.argv[1]).bytes())"
    done = subprocess.run([sys.executable, "-c", code, PYGPT], capture_output=True, text=True)
    assert int(done.stdout) == describe("pygpt").bytes()
