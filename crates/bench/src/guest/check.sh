#!/bin/busybox sh
# Fills a tmpfs with pseudo-random and repeated files whose sums are known before they are in memory, and checks them
# for ever, copying some every few seconds, reading and writing the disk where there is one.
#
#   CHECK ready files=N mib=N uptime=S    the files are there
#   CHECK ok ROUND files=N uptime=S       every file of one round had its sum
#   CHECK BAD ...                         one had not, each time
#   VERDICT ok|BAD rounds=N files=N bad=N the answer to a line "verdict", after one more round
# "pause S" sets the seconds between rounds, "quit" ends the guest.

param() {
    for word in $(cat /proc/cmdline); do
        case $word in "check.$1="*) echo "${word#*=}"; return ;; esac
    done
    echo "$2"
}
uptime() { read -r up idle < /proc/uptime; echo "$up"; }

mib=$(param mib 96)
pause=$(param pause 2)
round=0 files=0 bad=0 seen=0 copied=0 kept=$((mib / 20 + 1))
mkdir -p /data /run/sum /run/disk
mount -t tmpfs -o size="$((mib + 16))m" data /data

# add NAME < CONTENT: the sum is taken from the pipe, so that a wrong page in the file cannot get into it.
add() { tee "/data/$1" | sha256sum > "/run/sum/$1"; }

verdict_of() { [ "$bad" = 0 ] && echo ok || echo BAD; }

# verify WHAT FILE EXPECTED
verify() {
    set -- "$1" "$2" "$3" "$(sha256sum < "$2")"
    files=$((files + 1))
    [ "$3" = "$4" ] && return 0
    bad=$((bad + 1))
    # A second look tells a wrong page from a wrong read.
    echo "CHECK BAD round=$round file=$1 expected=${3%% *} got=${4%% *} again=$(sha256sum < "$2" | cut -c1-64)"
    return 1
}

copy() {
    slot=$((copied % kept)) source=$(ls /run/sum | grep -v copy | sed -n "$((copied % total + 1))p")
    copied=$((copied + 1))
    rm -f "/data/copy.$slot" "/run/sum/copy.$slot"
    cp "/data/$source" "/data/copy.$slot" && cp "/run/sum/$source" "/run/sum/copy.$slot" ||
        echo "CHECK BAD round=$round file=copy.$slot copying $source failed"
}

disk() {
    [ -b /dev/vda ] || return 0
    slots=$(($(cat /sys/class/block/vda/size) / 2048))
    slot=$((round * 7 % slots)) seed=$((round % 8))
    dd if=/seed/$seed of=/dev/vda bs=1M count=1 seek=$slot oflag=direct conv=notrunc 2> /run/dd ||
        { bad=$((bad + 1)); echo "CHECK BAD round=$round disk=$slot write: $(head -n 1 /run/dd)"; return; }
    sha256sum < /seed/$seed > /run/disk/$slot
    # This one through the page cache, the oldest of the others past it.
    other=$(ls -tr /run/disk | head -n 1)
    for way in "$slot" "$other iflag=direct"; do
        set -- $way
        dd if=/dev/vda bs=1M count=1 skip=$1 $2 2> /run/dd > /tmp/block ||
            { bad=$((bad + 1)); echo "CHECK BAD round=$round disk=$1 read: $(head -n 1 /run/dd)"; continue; }
        verify "disk.$1" /tmp/block "$(cat /run/disk/$1)"
    done
    touch /run/disk/$other
    rm /tmp/block
    echo 1 > /proc/sys/vm/drop_caches
}

(cd /seed && sha256sum -c sums > /run/seeds 2>&1) || { bad=1; echo "CHECK BAD seeds: $(grep -v OK /run/seeds)"; }
i=0
while [ $i -lt $((mib * 45 / 100 / 4)) ]; do
    # Equal in every guest and in part within one: four of the eight seeds, in turn.
    (for k in 0 1 2 3; do cat /seed/$(((i + k * (i / 8 + 1)) % 8)); done) | add common.$i
    i=$((i + 1))
done
i=0
while [ $i -lt $((mib * 30 / 100 / 4)) ]; do
    head -c 4194304 /dev/urandom | add own.$i
    i=$((i + 1))
done
yes "a line that is repeated, and so are the pages that it fills, from some page on" | head -c 4194304 | add text
head -c 4194304 /dev/zero | add zero
total=$(ls /run/sum | wc -l)
echo "CHECK ready files=$total mib=$(du -sm /data | cut -f1) uptime=$(uptime)"

# A job in the background has no standard input of its own.
(while read -r line; do echo "$line" > /run/next && mv /run/next /run/command; done) < /dev/ttyS1 &

while :; do
    round=$((round + 1)) before=$bad
    for sum in /run/sum/*; do
        name=${sum##*/}
        # A copy may have replaced it since the list was made.
        [ -e "$sum" ] && verify "$name" "/data/$name" "$(cat "$sum")"
        seen=$((seen + 1))
        [ $((seen % 8)) = 0 ] && copy
    done
    disk
    [ "$bad" = "$before" ] && echo "CHECK ok $round files=$files uptime=$(uptime)"
    waited=0
    while :; do
        if [ -e /run/command ]; then
            mv /run/command /run/now
            read -r word value < /run/now
            case $word in
                quit) echo "VERDICT $(verdict_of) rounds=$round files=$files bad=$bad"; exit "$bad" ;;
                verdict) asked=$((round + 1)) ;;
                pause) pause=$value ;;
            esac
        fi
        if [ -n "$asked" ]; then
            [ "$round" -ge "$asked" ] && { echo "VERDICT $(verdict_of) rounds=$round files=$files bad=$bad"; asked=; }
            break
        fi
        [ "$waited" -ge "$pause" ] && break
        sleep 1
        waited=$((waited + 1))
    done
done
