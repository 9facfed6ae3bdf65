"""Fetch the free wallpapers that hywu-mini is trained on, out of Debian packages: ``python models/fetch_photos.py FOLDER``.

Needs apt-get and dpkg-deb (Debian); nothing is installed, the packages are only unpacked. Any other folder of photos does
as well: ``hywu train mini --photos YOUR_FOLDER``.
"""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "gnome-backgrounds",
)


def main(folder: Path) -> int:
    """Download and unpack what is not there yet; returns the exit code."""
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        print(f"{' and '.join(missing)} not found: give your own photos, hywu train mini --photos FOLDER",
              file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = folder / package
        if target.is_dir():
            continue
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        archive = next(folder.glob(f"{package}_*.deb"))
        aside = folder / f"{package}.part"
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(aside)], check=True)
        aside.rename(target)
        archive.unlink()
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
