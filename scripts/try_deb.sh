#!/usr/bin/env bash
# Installs the Debian package in an empty Debian, and uses it there: mounts in a chroot, then under a booted systemd.
#
#   scripts/try_deb.sh PACKAGE.deb [FOLDER]      FOLDER (default: build/try-deb) keeps the empty Debian for the next time
#
# As root, with debootstrap, systemd-container and the network. Everything happens below FOLDER, in mount namespaces of
# its own; what is printed are the commands and what they said. The exit code is 0 if all of it worked.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
die() { printf 'try_deb: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || die "chroot and mounts need root"
[ -f "${1:-}" ] || die "name a package: scripts/make_deb.sh makes one"
for tool in debootstrap systemd-nspawn unshare; do
  command -v "$tool" > /dev/null || die "no $tool here; apt-get install debootstrap systemd-container util-linux"
done
DEB=$(realpath "$1")
FOLDER=$(realpath -m "${2:-build/try-deb}")
RELEASE=${RELEASE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")}
readonly DEB FOLDER RELEASE
readonly CLEAN=$FOLDER/$RELEASE ROOT=$FOLDER/root
trap 'rm -rf --one-file-system "$ROOT"' EXIT

if [ ! -e "$CLEAN/.done" ]; then
  say "an empty $RELEASE"
  rm -rf --one-file-system "$CLEAN"
  mkdir -p "$CLEAN"
  debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,libpam-systemd,ca-certificates "$RELEASE" "$CLEAN" > "$FOLDER/debootstrap.log"
  touch "$CLEAN/.done"
fi
rm -rf --one-file-system "$ROOT"
cp -a "$CLEAN" "$ROOT"
cp "$DEB" "$ROOT/root/hydrafs.deb"
cp /etc/resolv.conf "$ROOT/etc/resolv.conf" 2> /dev/null || true

cat > "$ROOT/root/install.sh" << 'EOF'
set -eux
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
[ -c /dev/fuse ] || mknod -m 666 /dev/fuse c 10 229
chmod 666 /dev/fuse
apt-get -q update
apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends /root/hydrafs.deb man-db
dpkg -s hydrafs | grep -E '^(Status|Version)'
hydrafs --version
man -l /usr/share/man/man1/hydrafs-mount.1.gz | head -3
ls /usr/share/bash-completion/completions/hydrafs /usr/lib/systemd/system/hydrafs@.service /usr/sbin/mount.hydrafs
mkdir -p /srv/models /mnt/models
cat > /root/models.py << 'PY'
import sys

sys.path.insert(0, "/usr/lib/hydrafs")
import numpy as np
from safetensors.numpy import save_file

rng = np.random.default_rng(1)
base = {f"layer.{i}.weight": rng.standard_normal((512, 512)).astype(np.float16) for i in range(16)}
save_file(base, "/srv/models/base.safetensors")
tuned = {k: (v.astype(np.float32) + rng.standard_normal(v.shape) * 1e-4).astype(np.float16) for k, v in base.items()}
save_file(tuned, "/srv/models/tuned.safetensors")
PY
python3 /root/models.py
chmod 644 /srv/models/*                                     # safetensors writes files for their owner alone
sha256sum < /srv/models/tuned.safetensors > /root/expected
hydrafs dehydrate /srv/models/tuned.safetensors
hydrafs doctor /srv/models
hydrafs mount /srv/models /mnt/models
hydrafs status
sha256sum < /mnt/models/tuned.safetensors | cmp - /root/expected
hydrafs umount /mnt/models
mount -v -t hydrafs /srv/models /mnt/models -o allow_other,cache_size=64M
sha256sum < /mnt/models/tuned.safetensors | cmp - /root/expected
umount /mnt/models
hydrafs mount /srv/models /mnt/models --warm
for _ in $(seq 150); do hydrafs status --json | grep -q '"reads": [1-9]' && break; sleep 0.2; done
hydrafs status --json | grep '"reads": [1-9]'
umount /mnt/models
EOF

cat > "$ROOT/root/booted.sh" << 'EOF'
set -eEux
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
same() { sha256sum < "$1/tuned.safetensors" | cmp - /root/expected; }
gone() { if mountpoint -q "$1"; then return 1; fi; }
until_true() {
  { set +x; } 2> /dev/null
  for _ in $(seq 150); do
    if "$@" 2> /dev/null; then
      set -x
      return
    fi
    sleep 0.2
  done
  set -x
  "$@"
}
trap 'set +x; systemctl --no-pager --lines=0 status "mnt-*" "hydrafs*" || true; journalctl --no-pager -o short-monotonic -b | tail -40' ERR
chmod 666 /dev/fuse
mkdir -p /etc/hydrafs
printf 'STORE=/srv/models\nMOUNTPOINT=/mnt/models\n' > /etc/hydrafs/models.conf
systemctl start hydrafs@models
same /mnt/models
setpriv --reuid=65534 --regid=65534 --clear-groups cat /mnt/models/tuned.safetensors > /dev/null
systemctl show -p StatusText,ActiveState,NRestarts,MainPID hydrafs@models
grep -E '^(CapEff|NoNewPrivs|Seccomp):' "/proc/$(systemctl show -P MainPID hydrafs@models)/status"
hydrafs status /mnt/models
systemctl reload hydrafs@models
same /mnt/models
: a crash
kill -KILL "$(systemctl show -P MainPID hydrafs@models)"
restarted() { [ "$(systemctl show -P NRestarts hydrafs@models)" = 1 ] && systemctl is-active hydrafs@models; }
until_true restarted
until_true same /mnt/models
: a daemon that hangs, with a watchdog of 3 s
mkdir -p /run/systemd/system/hydrafs@models.service.d
printf '[Service]\nWatchdogSec=3\nTimeoutStopSec=2\n' > /run/systemd/system/hydrafs@models.service.d/try.conf
systemctl daemon-reload
systemctl restart hydrafs@models
before=$(systemctl show -P MainPID hydrafs@models)
kill -STOP "$before"
another() { now=$(systemctl show -P MainPID hydrafs@models); [ "$now" != "$before" ] && [ "$now" != 0 ]; }
until_true another
until_true same /mnt/models
rm -r /run/systemd/system/hydrafs@models.service.d
systemctl daemon-reload
systemd-analyze security --no-pager hydrafs@models.service | tail -1
systemctl stop hydrafs@models
until_true gone /mnt/models
: automount
cp /usr/share/doc/hydrafs/examples/mnt-models.* /etc/systemd/system/
systemctl daemon-reload
if [ -e /dev/autofs ]; then
  systemctl start mnt-models.automount
else
  : this kernel has no autofs, so the mount unit alone
  systemctl start mnt-models.mount
fi
same /mnt/models
systemctl show -p What,Type,ActiveState mnt-models.mount
systemctl stop mnt-models.automount mnt-models.mount
until_true gone /mnt/models
: a user
useradd -m -u 1000 somebody
mkdir -p /home/somebody/.config/hydrafs
printf 'STORE=/srv/models\nMOUNTPOINT=/home/somebody/models\n' > /home/somebody/.config/hydrafs/models.conf
chown -R somebody: /home/somebody
systemctl start user@1000
as_user() { setpriv --reuid=1000 --regid=1000 --init-groups env HOME=/home/somebody XDG_RUNTIME_DIR=/run/user/1000 "$@"; }
as_user systemctl --user start hydrafs@models
as_user sh -c 'sha256sum < /home/somebody/models/tuned.safetensors' | cmp - /root/expected
as_user systemctl --user --no-pager status hydrafs@models | head -12
as_user systemctl --user stop hydrafs@models
until_true gone /home/somebody/models
: the worker
python3 /root/models.py
chmod 644 /srv/models/*.safetensors
rm -f /srv/models/tuned.safetensors.hydra
printf '[worker]\nsettle = 1\n' > /srv/models/.hydrafs/config.toml
unit=hydrafs-worker@$(systemd-escape -p /srv/models).service
systemctl start "$unit"
a_diff() { ls /srv/models/*.hydra; } # of which of the two is its to choose
until_true a_diff
said_so() { journalctl --no-pager -o cat -u "$unit" | grep '"hydrafs.worker", "message": "/srv/models/.* -> '; }
until_true said_so
grep -E '^(CapEff|NoNewPrivs|Seccomp):' "/proc/$(systemctl show -P MainPID "$unit")/status"
journalctl --no-pager -o cat -u "$unit" | tail -3
systemd-analyze security --no-pager "$unit" | tail -1
systemctl stop "$unit"
: over the store itself
printf 'STORE=/srv/models\nMOUNTPOINT=/srv/models\nDEHYDRATE=auto\n' > /etc/hydrafs/inplace.conf
systemctl start hydrafs@inplace
same /srv/models
ls /srv/models
cp /srv/models/tuned.safetensors /srv/models/again.safetensors
cmp /srv/models/again.safetensors /srv/models/tuned.safetensors
kill -KILL "$(systemctl show -P MainPID hydrafs@inplace)"
until_true same /srv/models
cmp /srv/models/again.safetensors /srv/models/tuned.safetensors
systemctl stop hydrafs@inplace
until_true gone /srv/models
ls /srv/models
: purge
systemctl start hydrafs@models
DEBIAN_FRONTEND=noninteractive dpkg --purge hydrafs
until_true gone /mnt/models
until_true [ ! -e /usr/lib/hydrafs ]
echo all of it worked > /root/booted.done
EOF
cat > "$ROOT/etc/systemd/system/try.service" << 'EOF'
[Service]
Type=oneshot
TimeoutStartSec=280
ExecStart=/bin/bash /root/booted.sh
StandardOutput=append:/root/booted.log
StandardError=append:/root/booted.log
ExecStopPost=systemctl poweroff --no-block
EOF
mkdir -p "$ROOT/etc/systemd/system/multi-user.target.wants"
ln -sf ../try.service "$ROOT/etc/systemd/system/multi-user.target.wants/try.service"

say "installed and mounted in a chroot"
unshare --mount --pid --fork --propagation private chroot "$ROOT" /bin/bash /root/install.sh < /dev/null

say "under systemd"
# systemd-nspawn wants a /run in memory, and one hierarchy of control groups; where this machine has neither, a mount
# namespace gives it both.
cat > "$FOLDER/boot.sh" << 'EOF'
[ "$(stat -f -c %T /run)" = tmpfs ] || mount -t tmpfs none /run
if [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ]; then
  umount -l -R /sys/fs/cgroup
  mount -t cgroup2 none /sys/fs/cgroup
  mkdir -p /sys/fs/cgroup/try-deb
  echo $$ > /sys/fs/cgroup/try-deb/cgroup.procs
fi
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
[ -e /dev/autofs ] && more=--bind=/dev/autofs || more=
exec systemd-nspawn -q -D "$1" --register=no --keep-unit --console=pipe --bind=/dev/fuse $more --capability=all \
  --private-users=no -b systemd.log_level=notice systemd.log_target=console
EOF
timeout 300 unshare --mount --propagation private bash "$FOLDER/boot.sh" "$ROOT" < /dev/null > "$FOLDER/console.log" 2>&1 || true
cat "$ROOT/root/booted.log" || cat "$FOLDER/console.log"
[ -e "$ROOT/root/booted.done" ] || die "it did not get to its end under systemd; the console is in $FOLDER/console.log"
say "all of it worked"
