"""A Metal shader without Metal: its file compiled as C++, and run for every thread."""

import ctypes
import subprocess
from pathlib import Path

# What <metal_stdlib> gives a shader, as far as ours need it.
STDLIB = """
#include <cstdint>
#include <cstring>
namespace metal {}
typedef unsigned char uchar;
typedef unsigned int uint;
struct uint2 { uint x, y; };
#define device
#define constant const
#define kernel extern "C"
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {  // to the nearest, ties to even
    uint32_t all;
    memcpy(&all, &value, 4);
    bits = uint16_t((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    uint32_t all = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &all, 4);
    return value;
  }
};
"""
OPTIONS = ["-std=c++17", "-O1", "-fsigned-char", "-ffp-contract=off", "-Wall", "-Wextra"]
# It knows neither Metal's attributes nor its pragmas.
IGNORED = ["-Wno-attributes", "-Wno-unknown-pragmas"]


class Position(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint)]


class Library:
    """As ``torch.mps.compile_shader`` answers: kernels are attributes, and take their threads."""

    def __init__(self, source: str, folder: Path) -> None:
        (folder / "metal_stdlib").write_text(STDLIB)
        (folder / "shader.cpp").write_text(source)
        library = folder / "shader.so"
        options = [*OPTIONS, *IGNORED, "-shared", "-fPIC", f"-I{folder}", "-o", str(library)]
        done = subprocess.run(
            ["g++", *options, str(folder / "shader.cpp")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or done.stderr:
            raise SyntaxError(done.stderr)  # which torch raises too
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str):
        function = getattr(self._library, name)

        def run(*arguments, threads: tuple[int, int]) -> None:
            # Tensors are buffers, numbers are passed by reference.
            passed = [
                ctypes.c_void_p(argument.data_ptr())
                if hasattr(argument, "data_ptr")
                else ctypes.byref(ctypes.c_long(argument))
                for argument in arguments
            ]
            for y in range(threads[1]):
                for x in range(threads[0]):
                    function(*passed, Position(x, y))

        return run
