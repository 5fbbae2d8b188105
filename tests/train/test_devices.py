"""A GPU or TPU that JAX cannot use, and a step that does not fit into the memory of a device."""

import logging
from functools import partial

import jax
import pytest
from jax import monitoring

import scconv_jax
from tests.train.tiny import create_tiny
from train import devices
from train.config.files import override
from train.config.flags import parse_flags
from train.config.schema import Config, ConfigError, Data
from train.data.batches import train_batches
from train.devices import check_accelerator, check_memory, memory_of, visible_accelerator
from train.main import explain, main
from train.optim import make_optimizer
from train.setup import make_setup, make_step
from train.step import init_state

GPU, TPU = "an NVIDIA GPU", "a TPU"


@pytest.fixture
def machine(monkeypatch):
    """Return a function that fakes an accelerator and how JAX starts on it: the platform, the error, the logged warnings."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def fake(accelerator, platform="cpu", error=None, warnings=(), platforms=None, quiet="Unknown backend"):
        def start():
            for name, text, exc_info in warnings:
                logging.getLogger(name).warning(text, exc_info=exc_info)
            if error is not None:
                raise error
            return platform

        def find(_):
            raise RuntimeError(quiet)

        monkeypatch.setattr(devices, "visible_accelerator", lambda: accelerator)
        monkeypatch.setattr(jax, "default_backend", start)
        monkeypatch.setattr(jax, "devices", find)
        monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)

    return fake


HINT = ("jax._src.xla_bridge", "An NVIDIA GPU may be present on this machine, but … Falling back to cpu.", None)
CUDNN = "Outdated cuDNN installation found.\nVersion JAX was built against: 90800\nInstalled version: 90100"


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        ({"accelerator": GPU, "warnings": [HINT]}, "JAX's plug-in for it is not installed"),
        (
            {
                "accelerator": GPU,
                "warnings": [("jax_plugins.xla_cuda12", f"CUDA version check failed. Error: {CUDNN}", None), HINT],
            },
            f"CUDA version check failed. Error: {CUDNN}",
        ),
        (
            {
                "accelerator": GPU,
                "warnings": [
                    ("jax._src.xla_bridge", "Exception when calling initialize()", (None, RuntimeError(CUDNN), None)),
                    HINT,
                ],
            },
            f"Exception when calling initialize(): {CUDNN}",
        ),
        (
            {"accelerator": GPU, "error": RuntimeError("Unable to initialize backend 'cuda': CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")},
            "Unable to initialize backend 'cuda': CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        ),
        (
            {"accelerator": GPU, "platforms": "cuda", "error": RuntimeError("Unable to initialize backend 'cuda'")},
            "Unable to initialize backend 'cuda'",
        ),
        (
            {"accelerator": TPU, "quiet": "Backend 'tpu' failed to initialize: The TPU is already in use by process 7."},
            "Backend 'tpu' failed to initialize: The TPU is already in use by process 7",
        ),
    ],
)
def test_an_accelerator_that_jax_cannot_use_is_an_error_with_jaxs_reason(machine, caplog, situation, reason):
    machine(**situation)
    with pytest.raises(ConfigError) as raised:
        check_accelerator()
    accelerator = situation["accelerator"]
    assert str(raised.value) == (
        f"this machine has {accelerator}, but JAX cannot use it: {' '.join(reason.split())}. {devices.INSTALL[accelerator]}. "
        "To compute on the CPU: --no-accel"
    )
    assert not caplog.records, "the error says it once"


def test_a_platform_that_the_machine_does_not_have(machine):
    machine(None, error=AssertionError(), platforms="cuda")
    with pytest.raises(ConfigError) as raised:
        check_accelerator()
    assert str(raised.value) == (
        "JAX cannot start: JAX_PLATFORMS=cuda names no device of this machine. To compute on the CPU: --no-accel"
    )


@pytest.mark.parametrize(
    "situation",
    [
        {"accelerator": GPU, "platforms": "cpu"},
        {"accelerator": None},
        {"accelerator": GPU, "platform": "gpu"},
        {"accelerator": TPU, "platform": "tpu"},
    ],
)
def test_a_chosen_cpu_and_an_accelerator_in_use_are_no_errors_and_warnings_are_kept(machine, caplog, situation):
    machine(**situation, warnings=[("jax", "Transparent hugepages are not enabled", None)])
    check_accelerator()
    assert [record.getMessage() for record in caplog.records] == ["Transparent hugepages are not enabled"]


def test_the_trainer_ends_before_it_makes_anything(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    machine(GPU, warnings=[HINT])
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: this machine has an NVIDIA GPU, but JAX cannot use it: JAX's plug-in for it is not installed."
    )
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "accelerator"),
    [
        ({}, None),
        ({"dev/nvidia0": ""}, GPU),
        ({"dev/nvidiactl": ""}, GPU),
        ({"dev/dxg": ""}, None),  # Windows shows any GPU so
        ({"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}, GPU),
        ({"dev/accel0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, TPU),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, TPU),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x8086\n"}, None),
        ({"sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, None),  # a network card of Google's cloud
    ],
)
def test_accelerators_are_known_by_their_files(tmp_path, monkeypatch, files, accelerator):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert visible_accelerator(tmp_path) == accelerator
    for none in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert visible_accelerator(tmp_path) == (None if accelerator == GPU else accelerator)


class Run:
    """What `check_memory` needs of a run of the tiny network with these flags."""

    def __init__(self, *flags):
        base = Config(data=Data(name="synthetic", image_size=32, batch_size=256, synthetic_train=1024))
        config = override(base, parse_flags(flags).given)
        setup, optimizer = make_setup(config), make_optimizer(config.optim, 0.1)
        state = init_state(setup.model, optimizer, setup.dataset.image_shape, 0)
        state = setup.parallel.put_state(jax.device_get(state))
        step = make_step(setup, config, optimizer)
        batch = next(train_batches(setup.dataset.train, config.data.batch_size, seed=0, first_step=0, threads=0))
        self.config, self.program = config, (step, state, setup.parallel.put_batch(batch))
        self.check = partial(check_memory, config, setup, optimizer, state, step=step)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(scconv_jax, "create_model", create_tiny)
    return Run


@pytest.fixture
def compilations():
    """The programs compiled in a test."""
    found = []

    def note(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    monitoring.register_event_duration_secs_listener(note)
    yield found
    monitoring.unregister_event_duration_listener(note)


def test_a_step_that_does_not_fit_is_an_error_with_a_step_that_fits(monkeypatch, run):
    large = run()
    need = memory_of(*large.program)
    monkeypatch.setattr(devices, "memory_limit", lambda: need * 2 // 3)
    monkeypatch.setattr(
        devices, "smaller_steps", lambda *_: [{"data.batch_size": 248}, {"data.batch_size": 128, "optim.lr": 0.05}]
    )
    with pytest.raises(ConfigError) as raised:
        large.check()
    limit = need * 2 // 3 >> 10 << 10
    assert str(raised.value) == (
        f"a step of data.batch_size 256 needs {need / 1e9:.3g} GB on each device, which has {limit / 1e9:.3g} GB: "
        "use --data.batch-size 128 --optim.lr 0.05"
    )


@pytest.mark.parametrize(
    ("limit", "flags", "options"),
    [
        (20, [], "--optim.accumulate 2 or --data.batch-size 128 --optim.lr 0.05 or --model.rematerialise"),
        (12, [], "--optim.accumulate 4 or --data.batch-size 64 --optim.lr 0.025"),
        (9, [], "--optim.accumulate 8 or --data.batch-size 32 --optim.lr 0.0125"),  # accumulated gradients take their place
        (9, ["--model.rematerialise"], "--optim.accumulate 4 or --data.batch-size 64 --optim.lr 0.025"),
        (9, ["--optim.lr-reference-batch", "256"], "--optim.accumulate 8 or --data.batch-size 32"),
        (
            9,
            ["--optim.accumulate", "4", "--data.batch-size", "1024"],
            "--optim.accumulate 32 or --data.batch-size 128 --optim.lr 0.0125",
        ),
        (3.5, ["--augment.mixup", "1"], "smaller images, a smaller network or more devices"),
        (0.1, [], "smaller images, a smaller network or more devices"),
    ],
)
def test_options_are_the_smallest_changes_whose_programs_fit(monkeypatch, run, limit, flags, options):
    def mebibytes(config, _state, _batch):
        """As on an accelerator: an image on each of 8 devices takes one, gradients two, accumulation as much again."""
        images = config.data.batch_size / 8 / config.optim.accumulate
        return int((images * (0.5 if config.model.rematerialise else 1) + 2 * (1 + (config.optim.accumulate > 1))) * 2**20)

    monkeypatch.setattr(devices, "memory_limit", lambda: int(limit * 2**20))
    monkeypatch.setattr(devices, "memory_of", mebibytes)
    monkeypatch.setattr(devices, "make_step", lambda _setup, config, _optimizer: config)
    with pytest.raises(ConfigError) as raised:
        run(*flags).check(step=run(*flags).config)
    assert str(raised.value).partition(": use ")[2] == options


def test_the_program_is_compiled_once_and_on_the_cpu_not_before_the_first_step(monkeypatch, run, compilations):
    a_run = run()
    step, state, batch = a_run.program
    del compilations[:]
    a_run.check()
    assert not compilations
    monkeypatch.setattr(devices, "memory_limit", lambda: 1 << 40)
    a_run.check()
    assert len(compilations) == 1
    for _ in range(2):
        state, _ = step(state, batch)
    assert len(compilations) == 1


def test_the_compiler_for_tpus_refuses_a_step_that_does_not_fit():
    class Step:
        def lower(self, *_):
            raise RuntimeError(self.message)

    step = Step()
    step.message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of 15.48G hbm. "
        "Exceeded hbm capacity by 5.02G."
    )
    assert memory_of(step, None, None) == 20.5 * 2**30
    step.message = "INTERNAL: something else. Used 20.5G of 15.48G"
    with pytest.raises(RuntimeError, match="something else"):
        memory_of(step, None, None)


def test_memory_that_runs_out_later_is_one_line():
    text, code = explain(
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\nBuffers:")
    )
    assert text == (
        "error: a device has too little memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes; fewer images "
        "(--data.batch-size), --optim.accumulate and --model.rematerialise need less; the checkpoints written before are kept"
    )
    assert code == 1
