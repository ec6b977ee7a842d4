#!/usr/bin/env bash
# Train across two "machines" of this one: two network namespaces, each with an address, a host name and a folder of its
# own, joined by a cable. No folder is shared. As root, with mpich:  tests/tools/two_machines.sh PYTHON
set -euo pipefail
python=$(realpath -s "${1:-python}")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
names=(nanollm-one nanollm-two)
ends() {
    for name in "${names[@]}"; do ip netns del "$name" 2> /dev/null || true; done
    rm -rf "$work"
}
trap ends EXIT

ip link add cable-one type veth peer name cable-two
for i in 0 1; do
    name=${names[$i]} cable=(cable-one cable-two)
    ip netns add "$name"
    ip link set "${cable[$i]}" netns "$name"
    ip -n "$name" addr add "10.77.0.$((i + 1))/24" dev "${cable[$i]}"
    ip -n "$name" link set "${cable[$i]}" up
    ip -n "$name" link set lo up
    mkdir -p "$work/$name"
done

# What ssh does between real machines: run a command on the other one, which sees the folder `here` as its own.
cat > "$work/launcher" <<LAUNCHER
#!/usr/bin/env bash
while [[ \$1 != 10.77.* ]]; do shift; done
case \$1 in 10.77.0.1) name=${names[0]};; *) name=${names[1]};; esac
shift
exec ip netns exec \$name unshare --uts --mount bash -c \
    "hostname \$name; mount --bind $work/\$name $work/here; cd $work/here; \$*"
LAUNCHER
chmod +x "$work/launcher"
mkdir "$work/here"

cd "$work"
PYTHONPATH="$root:$root/tests/tools" "$python" -c "
import sys, tiny
from pathlib import Path
for name in sys.argv[1:]:
    tiny.make_files(Path(name))" "${names[@]}"
flags="--embedding-dim 16 --n-block 2 --n-head 2 --hidden-dim 24 --max-context 8 --batch-size 4 --max-steps 20
       --log-every 10 --save-every 10 --device cpu"
files="--text text.txt --tokenizer tokenizer.json --artifact-dir run"
# One kernel, one memory: UCX, on which mpich sends, would find its way around the cable.
mpi="UCX_TLS=tcp,self $(dirname "$python")/mpiexec -launcher ssh -launcher-exec $work/launcher -hosts 10.77.0.1,10.77.0.2 -ppn 2"
run() {
    "$work/launcher" 10.77.0.1 \
        "NANOLLM_THREADS=1 NANOLLM_CACHE=cache $mpi -n 4 -wdir $work/here $python $root/train.py $*"
}
echo "--- two machines, two processes on each"
run $flags $files
echo "--- what each machine has"
ls nanollm-one nanollm-two
echo "bytes through the cable: $(ip netns exec "${names[0]}" cat /sys/class/net/cable-one/statistics/tx_bytes) there," \
    "$(ip netns exec "${names[0]}" cat /sys/class/net/cable-one/statistics/rx_bytes) back"
echo "--- one machine, four processes: the same bits"
(cd nanollm-two && NANOLLM_THREADS=1 NANOLLM_CACHE=cache "$python" "$root/train.py" $flags $files --processes 4 > /dev/null)
cmp nanollm-one/run/model.safetensors nanollm-two/run/model.safetensors && echo "equal"
mv nanollm-two/run whole
echo "--- resumed from step 10 on both machines; only the first one has the checkpoint"
rm -r nanollm-one/run/checkpoint-20 nanollm-one/run/model.safetensors nanollm-one/run/config.json
run --resume --artifact-dir run | grep -E "device|training   "
cmp nanollm-one/run/model.safetensors whole/model.safetensors && echo "equal"
echo "--- another text on the second machine"
echo more >> nanollm-two/text.txt
run $flags --text text.txt --tokenizer tokenizer.json --artifact-dir other || echo "refused, code $?"
