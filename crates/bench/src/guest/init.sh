#!/bin/busybox sh
# The first process of a guest: makes it a Linux system, loads modules, runs /job on the second serial port and powers
# off. What the kernel and this script say goes to the first one.
echo 'init: begun'
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=dumb
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /tmp /run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
# Files of the image may lie below /tmp: they move into what is mounted over it.
mkdir /run/tmp
mount -t tmpfs tmp /run/tmp
mv /tmp/* /run/tmp/ 2> /dev/null
mount --move /run/tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t tracefs tracing /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
ln -s /proc/self/fd /dev/fd
ifconfig lo 127.0.0.1 up
[ -e /etc/hostname ] && hostname -F /etc/hostname
while read -r module; do
    insmod "/modules/$module" || echo "init: module $module failed"
done < /modules/order
# Without this the line discipline would turn every newline into two bytes.
stty -F /dev/ttyS1 raw -echo
cd /tmp
/job < /dev/ttyS1 > /dev/ttyS1 2>&1
printf '\n@@pagefold-exit %d\n' $? > /dev/ttyS1
sync
poweroff -f
