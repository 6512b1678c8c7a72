# Numbers and their squares; every fiftieth line waits for a child.
i=0
while [ $i -lt 4000 ]; do
    echo "$i $((i * i))"
    i=$((i + 1))
    [ $((i % 50)) -ne 0 ] || sleep 0.05
done
echo "digits $(seq 1 $i | paste -sd+ | wc -c)"
