#!/bin/sh
# The table of docs/programs.md. Run it on a Debian 12 machine or in a container that has the packages:
#
#   cargo build --release -p pagefold-proof --example programs
#   docs/examples/programs.sh target/release/examples/programs
#
# What is not installed is left out.
set -eu

table=$1
shift
# Each line: a program, and folders with the modules that it opens.
while read -r program folders; do
    [ -e "$program" ] || continue
    modules=
    for folder in $folders; do
        # llvmjit brings LLVM into PostgreSQL, a compiler that is on no list.
        for module in $(find "$folder" -name '*.so*' -type f ! -name 'llvmjit.so' 2>/dev/null); do
            modules=$modules,$module
        done
    done
    set -- "$@" "$program$modules"
done <<'LIST'
/usr/bin/redis-server
/usr/sbin/nginx
/usr/bin/memcached
/usr/sbin/haproxy
/usr/sbin/varnishd
/usr/bin/bash
/usr/bin/git
/usr/sbin/sshd
/usr/sbin/smbd
/usr/lib/gcc/x86_64-linux-gnu/12/cc1
/usr/bin/rustc
/usr/lib/postgresql/15/bin/postgres /usr/lib/postgresql/15/lib
/usr/bin/python3.11 /usr/lib/python3.11/lib-dynload
/usr/bin/python3.11 /usr/lib/python3/dist-packages/numpy
/usr/bin/python3.11 /usr/lib/python3/dist-packages/numpy /usr/lib/python3/dist-packages/scipy /usr/lib/python3/dist-packages/pandas
/usr/bin/node
/usr/lib/jvm/java-17-openjdk-amd64/bin/java /usr/lib/jvm/java-17-openjdk-amd64/lib
/usr/bin/ruby3.1 /usr/lib/x86_64-linux-gnu/ruby/3.1.0
/usr/bin/php8.2 /usr/lib/php/20220829
/usr/sbin/php-fpm8.2 /usr/lib/php/20220829
/usr/lib/erlang/erts-13.1.5/bin/beam.smp
/usr/bin/luajit
/usr/bin/qemu-system-x86_64
/usr/bin/qemu-system-x86_64 /usr/lib/x86_64-linux-gnu/qemu
/usr/sbin/mariadbd /usr/lib/mysql/plugin
/usr/lib/x86_64-linux-gnu/libjemalloc.so.2
/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4
/usr/lib/x86_64-linux-gnu/libtcmalloc.so.4
/usr/lib/x86_64-linux-gnu/libgomp.so.1
/usr/lib/x86_64-linux-gnu/libitm.so.1
/usr/bin/gh
/usr/bin/busybox
/lib/ld-musl-x86_64.so.1
LIST
exec "$table" "$@"
