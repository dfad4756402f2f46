"""What is asked of the CUDA driver for a launch, without one."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch
from cuda.bindings import driver as nvidia

from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import KernelBinary, cuda_driver, launch, launching
from hybrid_moe.gpu_kernels.toolchain.cubin import Resources
from hybrid_moe.gpu_kernels.toolchain.parameters import parameter_places
from tests.gpu.toolchain.fake_driver import DeviceTensor, FakeLibrary
from tests.gpu.toolchain.kernels import scaling


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    """The driver's stand-in, in a process that has launched nothing."""
    library = FakeLibrary(sizes=(8, 8, 4, 4))
    fake = cuda_driver.CudaDriver(library)
    monkeypatch.setattr(cuda_driver, "driver", lambda: fake)
    monkeypatch.setattr(launching, "device_architecture", lambda device: "sm_90")
    monkeypatch.setattr(launching, "compiled", _binary)
    monkeypatch.setattr(launching, "warm", lambda definitions, arch: None)
    monkeypatch.setattr(launching, "current_stream", lambda device: 70 + device)
    monkeypatch.setattr(launching, "_aliases", {})
    launching._launcher.cache_clear()
    yield library
    launching._launcher.cache_clear()


def _binary(definition: KernelDefinition, arch: str) -> KernelBinary:
    resources = Resources(14, 0, 0, parameter_places(definition))
    return KernelBinary(arch, "scale_0", "", f"code of {definition.config}".encode(), resources)


def test_a_launch(library: FakeLibrary) -> None:
    """Parameters lie as C lays them out; grid, block, stream and shared memory are the caller's."""
    x, y = DeviceTensor(0x7F00_0000_1000), DeviceTensor(0x7F00_0000_2000)
    launch(scaling(), [x, None, -5, 0.75], grid=(3, 2), stream=99)
    launch(scaling(), [x, y, 2**31 - 1, 2.0], grid=7)
    first, second = library.launches
    assert b"".join(first["parameters"]) == struct.pack("<QQif", 0x7F00_0000_1000, 0, -5, 0.75)
    assert b"".join(second["parameters"]) == struct.pack(
        "<QQif", 0x7F00_0000_1000, 0x7F00_0000_2000, 2**31 - 1, 2.0
    )
    assert (first["grid"], second["grid"]) == ((3, 2, 1), (7, 1, 1))
    assert first["block"] == (128, 1, 1)
    assert (first["stream"], second["stream"]) == (99, 70), "else torch's current stream"
    assert first["shared"] == 0 and not library.attributes
    assert first["attributes"] == {}
    assert len(library.loaded) == 1, "equal definitions are one kernel"


def test_programmatic_dependent_launch(library: FakeLibrary) -> None:
    x = DeviceTensor(4096)
    for pdl in (True, False):
        launch(scaling(), [x, x, 1, 1.0], grid=1, pdl=pdl)
    attribute = nvidia.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert [each["attributes"] for each in library.launches] == [{int(attribute): 1}, {}]


def test_shared_memory_beyond_48_kib_is_asked_for(library: FakeLibrary) -> None:
    x = DeviceTensor(4096)
    for shared_bytes in (48 << 10, 96 << 10):
        launch(scaling(shared_bytes), [x, x, 1, 1.0], grid=1)
    attribute = nvidia.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert library.attributes == [(200, int(attribute), 96 << 10)]
    assert [each["shared"] for each in library.launches] == [48 << 10, 96 << 10]


def test_every_device_has_its_function(library: FakeLibrary) -> None:
    """Code is loaded into the context of the tensors' device, in which the launch happens too; the
    thread's own context is put back."""
    definition = scaling()
    for device in (1, 0, 1):
        x = DeviceTensor(4096, device)
        launch(definition, [x, x, 1, 1.0], grid=1)
    assert [context for _, context, _ in library.loaded] == [1001, 1000]
    assert [each["context"] for each in library.launches] == [1001, 1000, 1001]
    assert [each["function"] for each in library.launches] == [100, 200, 100]
    assert [each["stream"] for each in library.launches] == [71, 70, 71]
    assert library.contexts == [None]
    library.contexts = [1000]
    library.calls.clear()
    launch(definition, [DeviceTensor(4096), None, 1, 1.0], grid=1)
    assert library.calls == ["cuCtxGetCurrent", "cuLaunchKernelEx"], "nothing else in a warm launch"


def test_loading_is_allowed_under_capture(library: FakeLibrary) -> None:
    launching.prepare([scaling(), scaling(each=1)], torch.device("cuda", 0))
    relaxed = int(nvidia.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    assert [mode for *_, mode in library.loaded] == [relaxed, relaxed]
    assert library.mode == 0 and not library.launches


def test_no_blocks_no_launch(library: FakeLibrary) -> None:
    x = DeviceTensor(4096)
    launch(scaling(), [x, x, 0, 1.0], grid=(0, 5))
    assert library.launches == []


@pytest.mark.parametrize(
    ("values", "grid", "message"),
    [
        ((4096, 4096, 1), 1, "3 values for 4 arguments"),
        ((None, None, 1, 1.0), 1, "no tensor tells the device"),
        ((4096, 4104, 1, 1.0), 1, "y begins at address 0x1008, must be a multiple of 16"),
        ((4096, torch.zeros(4), 1, 1.0), 1, "y is on cpu, must be on cuda:0 as the others"),
        ((torch.zeros(4), 4096, 1, 1.0), 1, "x is on cpu, must be on a CUDA device"),
        ((4096, DeviceTensor(4096, 1), 1, 1.0), 1, "y is on cuda:1, must be on cuda:0"),
        ((4096, None, 2**31, 1.0), 1, "n = 2147483648 is no i32"),
        ((4096, None, 1, "1"), 1, "factor = '1' is no f32"),
        ((4096, None, 1, 1.0), (1, 65536), "a grid of 1 x 65536 x 1 blocks"),
        ((4096, None, 1, 1.0), -1, "a grid of -1 x 1 x 1 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(
    library: FakeLibrary, values: tuple[object, ...], grid: int | tuple[int, ...], message: str
) -> None:
    """Before the driver hears of it: a wrong address would cost the whole process its context."""
    tensors = [DeviceTensor(v) if isinstance(v, int) and v >= 4096 and i < 2 else v
               for i, v in enumerate(values)]  # fmt: skip
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        launch(scaling(), tensors, grid)  # type: ignore[arg-type]
    assert library.launches == []


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("cuModuleLoadData", "NO_BINARY_FOR_GPU", "loading scale .* for another architecture"),
        ("cuModuleLoadData", "OUT_OF_MEMORY", "give the GPU fewer experts"),
        ("cuFuncSetAttribute", "INVALID_VALUE", "98304 bytes of shared memory"),
        ("cuLaunchKernelEx", "ILLEGAL_ADDRESS", "launching scale .*compute-sanitizer"),
        ("cuLaunchKernelEx", "LAUNCH_OUT_OF_RESOURCES", "more registers or shared memory"),
        ("cuLaunchKernelEx", "STREAM_CAPTURE_UNSUPPORTED", "run the model once before"),
        ("cuDevicePrimaryCtxRetain", "NO_DEVICE", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_errors_of_the_driver(library: FakeLibrary, call: str, code: str, message: str) -> None:
    """One RuntimeError with the cure. The thread's context is put back, and the next launch works
    if the driver lets it."""
    number = int(getattr(nvidia.CUresult, f"CUDA_ERROR_{code}"))
    library.codes[call] = number
    x = DeviceTensor(4096)
    definition = scaling(96 << 10)
    with pytest.raises(RuntimeError, match=message) as raised:
        launch(definition, [x, x, 1, 1.0], grid=1)
    assert f"CUDA_ERROR_{number} (error {number})" in str(raised.value)
    assert isinstance(raised.value, torch.OutOfMemoryError) == (code == "OUT_OF_MEMORY")
    assert library.contexts == [None] and library.mode == 0
    library.codes.clear()
    launch(definition, [x, x, 1, 1.0], grid=1)
    assert len(library.launches) == 1


def test_an_old_driver_lacks_functions() -> None:
    library = FakeLibrary()
    del library.cuLaunchKernelEx
    with pytest.raises(RuntimeError, match=r"no cuLaunchKernelEx: .* install a newer driver"):
        cuda_driver.CudaDriver(_WithoutClass(library))


class _WithoutClass:
    """Only the attributes of an object, not its class's."""

    def __init__(self, other: object) -> None:
        self.__dict__.update(vars(other))


def test_records_are_the_drivers() -> None:
    """Sizes and places as in NVIDIA's bindings; every error with a cure is one that there is."""
    import ctypes

    config = nvidia.CUlaunchConfig()
    config.gridDimX, config.blockDimZ, config.sharedMemBytes, config.hStream = 3, 5, 7, 11
    raw = ctypes.string_at(config.getPtr(), ctypes.sizeof(cuda_driver.LaunchConfig))
    ours = cuda_driver.LaunchConfig.from_buffer_copy(raw)
    assert (ours.grid_x, ours.block_z, ours.shared_bytes, ours.stream) == (3, 5, 7, 11)
    attribute = nvidia.CUlaunchAttribute()
    attribute.id = nvidia.CUlaunchAttributeID(cuda_driver.PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value.programmaticStreamSerializationAllowed = 1
    raw = ctypes.string_at(attribute.getPtr(), ctypes.sizeof(cuda_driver.LaunchAttribute))
    assert raw == bytes(
        cuda_driver.LaunchAttribute(id=cuda_driver.PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    )
    assert len(raw) == 72
    assert set(cuda_driver.CURES) <= {int(code) for code in nvidia.CUresult}
