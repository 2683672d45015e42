#!/usr/bin/env bash
# Builds build/hydrafs_VERSION_ARCH.deb: hydrafs and the Python libraries that it needs in /usr/lib/hydrafs, where nothing
# else on the system sees them; the units, man pages, shell completion and mount.hydrafs beside it.
#
#   scripts/make_deb.sh [FOLDER]      where the package goes (default: build)
#
# The libraries hold code for one version of Python: that of the Debian that the package is for. DEB_PYTHON names it
# (default: that of /usr/bin/python3). Needs dpkg-deb, and .venv as `make mount` makes it (or PYTHON with pip and the
# libraries of hydrafs).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'make_deb: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

readonly OUT=${1:-build}
readonly PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || die "no $PYTHON here; run scripts/setup.sh mount first"
command -v dpkg-deb > /dev/null || die "no dpkg-deb here; a Debian package is made on Debian or Ubuntu"
readonly DEB_PYTHON=${DEB_PYTHON:-$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
readonly NEXT=${DEB_PYTHON%.*}.$((${DEB_PYTHON#*.} + 1))
ARCH=$(dpkg --print-architecture)
VERSION=$("$PYTHON" -c 'from hydrafs.version import __version__ as v; print(v.replace(".dev", "~dev").replace("rc", "~rc"))')
LIBC=$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2) # the extensions may ask for it: they were linked against this one
readonly ARCH VERSION LIBC

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
lib=$root/usr/lib/hydrafs
mkdir -p "$lib" "$OUT"

pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 "$PYTHON" -m pip "$@" < /dev/null >&2 || die "pip failed, see above"; }

say "building the wheel"
# From a copy: what a build leaves behind (build/, extensions for another Python) must not get into another build.
mkdir "$work/source"
tar -c --exclude=__pycache__ --exclude='*.so' pyproject.toml setup.py MANIFEST.in README.md hydrafs systemd | tar -x -C "$work/source"
pip wheel -qq --no-deps --wheel-dir "$work" "$work/source"
wheel=$(echo "$work"/hydrafs-*.whl)
case $wheel in
  *-abi3-* | *-cp"${DEB_PYTHON/./}"-cp*) ;;
  *) die "$(basename "$wheel") is not for Python $DEB_PYTHON; make .venv with it: PYTHON=python$DEB_PYTHON scripts/setup.sh mount" ;;
esac

say "collecting libraries for Python $DEB_PYTHON"
# numpy is Debian's own: large, and always new enough there.
constraints=$(grep -v '^numpy' constraints.txt)
"$PYTHON" -c '
import sys, zipfile, email.parser
from pathlib import Path
text = next(zipfile.ZipFile(sys.argv[1]).read(n) for n in zipfile.ZipFile(sys.argv[1]).namelist() if n.endswith("/METADATA"))
for line in email.parser.BytesParser().parsebytes(text).get_all("Requires-Dist"):
    if "extra ==" not in line and not line.startswith("numpy"):
        print(line)
' "$wheel" > "$work/requirements.txt"
pip install -qq --no-compile --only-binary :all: --python-version "$DEB_PYTHON" --target "$lib" \
  --constraint <(printf '%s\n' "$constraints") -r "$work/requirements.txt"
pip install -qq --no-compile --no-deps --python-version "$DEB_PYTHON" --only-binary :all: --target "$lib" "$wheel"
rm -rf "$lib/bin" "$lib/share" "$lib"/numpy "$lib"/numpy-*
[ -e "$lib"/hydrafs/_rans.abi3.so ] || [ -n "$(find "$lib/hydrafs" -name '_rans*.so')" ] \
  || die "the wheel has no native codec: install gcc and the headers of Python"

say "man pages, completion, units"
mkdir -p "$root"/usr/bin "$root"/usr/sbin "$root"/etc/hydrafs
launcher() {
  cat > "$1" << EOF
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/usr/lib/hydrafs")
from $2 import $3

sys.exit($3())
EOF
  chmod 755 "$1"
}
launcher "$root/usr/bin/hydrafs" hydrafs.__main__ run
launcher "$root/usr/sbin/mount.hydrafs" hydrafs.cli.fstab main
"$PYTHON" -m scripts.make_man "$root/usr/share/man" > /dev/null
gzip -9n "$root"/usr/share/man/man?/*
complete() {
  mkdir -p "$(dirname "$root/$2")"
  "$PYTHON" -m hydrafs completion "$1" > "$root/$2"
}
complete bash usr/share/bash-completion/completions/hydrafs
complete zsh usr/share/zsh/vendor-completions/_hydrafs
complete fish usr/share/fish/vendor_completions.d/hydrafs.fish
install -D -m 644 -t "$root/usr/lib/systemd/system" systemd/*@.service
install -D -m 644 -t "$root/usr/lib/systemd/user" systemd/user/*@.service
doc=$root/usr/share/doc/hydrafs
install -D -m 644 -t "$doc/examples" systemd/example.conf systemd/*.mount systemd/*.automount
install -D -m 644 -t "$doc" README.md docs/*.md
gzip -9n < CHANGELOG.md > "$doc/changelog.gz"
cat > "$doc/copyright" << 'EOF'
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: hydrafs
Comment: The libraries in /usr/lib/hydrafs carry their own licences in their *.dist-info folders.

Files: *
Copyright: the hydrafs authors
License: Apache-2.0
 On Debian systems, the licence is in /usr/share/common-licenses/Apache-2.0.
EOF

mkdir "$root/DEBIAN"
cat > "$root/DEBIAN/control" << EOF
Package: hydrafs
Version: $VERSION
Architecture: $ARCH
Maintainer: the hydrafs authors <hydrafs@localhost>
Section: utils
Priority: optional
Depends: python3 (>= $DEB_PYTHON~), python3 (<< $NEXT~), python3-numpy (>= 1:1.24), fuse3, libc6 (>= $LIBC)
Suggests: python3-prometheus-client, python3-matplotlib, python3-diskcache
Installed-Size: $(du -k -s --apparent-size "$root" | cut -f1)
Description: filesystem for model checkpoints
 Fine-tunes of image and language models are stored as small exact diffs
 against their base, and a mount shows each as the full file that it was,
 byte for byte, to any program.
EOF
cat > "$root/DEBIAN/postinst" << 'EOF'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
  # Compiled once, here: who runs hydrafs may not write there, and would compile it anew each time.
  /usr/bin/python3 -I -m compileall -q /usr/lib/hydrafs || true
  if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
fi
EOF
cat > "$root/DEBIAN/prerm" << 'EOF'
#!/bin/sh
set -e
# An upgrade leaves what is mounted alone: programs have files open there. systemctl restart takes the new version.
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
  systemctl stop 'hydrafs@*.service' 'hydrafs-worker@*.service' || true
fi
find /usr/lib/hydrafs -name __pycache__ -prune -exec rm -rf {} +
EOF
cat > "$root/DEBIAN/postrm" << 'EOF'
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
EOF
chmod 755 "$root"/DEBIAN/p*
chmod -R u+rwX,go=rX "$root"
chmod 755 "$root"/DEBIAN/p*
deb=$OUT/hydrafs_${VERSION}_$ARCH.deb
dpkg-deb --root-owner-group -Zxz --build "$root" "$deb" >&2
echo "$deb"
