"""What the engine says of itself."""

from structlog.testing import capture_logs

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.settings import EngineSettings


async def test_forms_that_the_device_cannot_have_are_no_part_of_its_name_and_are_warned_of() -> None:
    engine = Engine(EngineSettings(device="cpu", num_threads=1, compiled=True))
    with capture_logs() as logs:
        engine.start()
        await engine.ready
    await engine.stop()
    assert engine.device.endswith(", float32")
    assert [(entry["log_level"], entry["wanted"]) for entry in logs] == [("warning", ("compiled",))]


def test_fast_forms_are_those_of_cuda_graphs() -> None:
    assert EngineSettings(compiled=True, fp8=True).fast_forms == ("compiled", "fp8")
    assert EngineSettings(compiled=True, graphs=False).fast_forms == ()
