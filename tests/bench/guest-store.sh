# The benchmarks' S3 server, in the guest; sourced before guest.sh's functions are used. $bench is the program.
# shellcheck shell=bash

export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=not-a-secret AWS_REGION=us-east-1

# Sets $server_PID, $address, and what a daemon finds it by, with the settings of what is measured. It lives as long as
# its input is open.
start_server() {
    cat >/mnt/quarry.toml <<TOML
[reactor]
threads = 1
[cache]
# What was hot would be fetched at once.
hot_set = false
TOML
    export QUARRY_CONFIG=/mnt/quarry.toml
    coproc server { exec "$bench" store --delay-ms 0 --memory-mib 512; }
    read -r address <&"${server[0]}" || fail "no S3 server"
    export AWS_ENDPOINT_URL=http://$address
    # shellcheck disable=SC2034 # guest.sh has it
    store=s3://bench/quarry
}

stop_server() {
    exec {server[1]}>&-
}
