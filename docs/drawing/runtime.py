"""Copies ONNX Runtime for browsers, from its npm package, to the drawing page: `python docs/drawing/runtime.py`.

package.json pins the version. Without npm the page is built all the same, and says what it lacks.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = HERE.parent / "extra" / "draw" / "runtime"
# The library, and WebAssembly that runs in one thread where a server sends no special headers, as plain ones do not.
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def copy_runtime() -> str:
    """Copy the files, unless they are there, and return an empty string, or the reason why they cannot be copied."""
    pinned = (HERE / "package.json").read_text()
    made = RUNTIME / "package.json"  # tells which version the files are of
    if made.exists() and made.read_text() == pinned and all((RUNTIME / name).exists() for name in FILES):
        return ""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    build = HERE.parents[1] / "build" / "draw"
    build.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, build)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=build, capture_output=True, text=True)
    if done.returncode:
        return f"npm failed: {done.stderr.strip()[-300:]}"
    RUNTIME.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(build / "node_modules" / "onnxruntime-web" / "dist" / name, RUNTIME)
    made.write_text(pinned)
    return ""


if __name__ == "__main__":
    if reason := copy_runtime():
        print(
            f"The page docs/draw.md lacks ONNX Runtime ({reason}). Install Node.js with npm, then run `make docs` again.",
            file=sys.stderr,
        )
