"""`python -m mini_lb ...` becomes the program `mini-lb ...`: the same process, signals and exit code."""

import os
import sys
import sysconfig


def program() -> str:
    """The mini-lb that was installed with this module, wherever pip has put it."""
    package = os.path.dirname(os.path.abspath(__file__))
    folders = [
        sysconfig.get_path("scripts"),
        # pip install --user
        sysconfig.get_path("scripts", scheme=f"{os.name}_user"),
        # pip install --target FOLDER
        os.path.join(os.path.dirname(package), "bin"),
    ]
    for folder in folders:
        path = os.path.join(folder, "mini-lb")
        if os.access(path, os.X_OK):
            return path
    sys.exit(f"the program mini-lb is in none of {', '.join(folders)}: install the package again")


path = program()
os.execv(path, [path, *sys.argv[1:]])
