"""Compiles libraries of csrc/ under the torch of this Python; see --help.

The CUDA library is also compiled where torch is built for another CUDA than nvcc's: what its
sources include of torch does not depend on CUDA, so that any nvcc can try any torch's headers.

--odr looks for two definitions of one name, which no compiler sees and of which the linker keeps
either: g++ compares the types of all files when it links (-Wodr), gold the lines in which inline
functions are defined (--detect-odr-violations).
"""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
import commands
import nvcc
import toolchain

parser = argparse.ArgumentParser(description="Compile libraries of csrc/ under this torch.")
parser.add_argument("folder", type=Path, help="for the objects and libraries")
parser.add_argument("names", nargs="+", choices=toolchain.LIBRARIES)
mode = parser.add_mutually_exclusive_group()
mode.add_argument("--objects", action="store_true", help="compile, but do not link")
mode.add_argument("--odr", action="store_true", help="fail on two definitions of one name (g++)")
options = parser.parse_args()
if options.odr:
    flags = "-O0 -g1 -flto -ffat-lto-objects -Werror=odr -Wno-psabi"
    os.environ["CXXFLAGS"] = f"{os.environ.get('CXXFLAGS', '')} {flags}"
for name in options.names:
    if name == "cuda":
        release = re.search(r"release ([\d.]+)", commands.output([nvcc.find_nvcc(), "--version"]))
        torch = dataclasses.replace(toolchain._torch(), cuda=release[1])
        toolchain._torch = lambda torch=torch: torch
    _, _, plan = toolchain.LIBRARIES[name]
    objects = options.folder / name
    made = plan(objects)
    made.compile(objects)
    if not options.objects:
        made.link_to(objects / f"libmagsd_{name}.so")
    if options.odr:
        words = "-fno-lto -fuse-ld=gold -Wl,--detect-odr-violations,--fatal-warnings"
        functions = dataclasses.replace(made, link=[*made.link, *words.split()])
        functions.link_to(objects / "functions.so")
    print(f"{name}: compiled under torch {made.report['torch']} by {made.report['compiler']}")
