# Sourced: `cpu` is one of the host's, and nobody else's who asks so, as long as there is one. It is this shell's until it ends.
cpu=$(($$ % $(nproc --all)))
for ((candidate = $(nproc --all) - 1; candidate >= 0; candidate--)); do
    exec {cpu_lock}>"${TMPDIR:-/tmp}/quarry-uml-cpu.$UID.$candidate" || continue
    if flock --nonblock "$cpu_lock"; then
        cpu=$candidate
        break
    fi
    exec {cpu_lock}>&-
done
