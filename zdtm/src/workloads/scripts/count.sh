# Counts in a variable, in a file, and through a long-lived pipe; all three must agree at the end.
dir=$1
stop=
trap 'stop=1' TERM
count=0
: >"$dir/files/numbers"

# A child for the whole life: it adds a mark to every line that comes.
coproc marker { trap '' TERM; while read -r line; do echo "$line!"; done; }

fail() { echo "FAIL: $1" >"$dir/result.new"; mv "$dir/result.new" "$dir/result"; exit 1; }

while [ -z "$stop" ]; do
    count=$((count + 1))
    echo "$count" >>"$dir/files/numbers"
    echo "$count" >&"${marker[1]}" || fail "the child does not take line $count"
    read -r answer <&"${marker[0]}" || fail "the child does not answer line $count"
    [ "$answer" = "$count!" ] || fail "the child answered '$answer' to $count"
    # A pipeline of short-lived children, and a command substitution. With backquotes: bash 5.2 parses $() once more
    # each time, and a trap that runs meanwhile is lost with an error now and then.
    sum=`printf '%s\n' "$count" 1 | { trap '' TERM; read -r a; read -r b; echo $((a + b)); }`
    [ "$sum" = $((count + 1)) ] || fail "the pipeline gave '$sum' for $count + 1"
    [ "$count" = 3 ] && : >"$dir/ready"
done

lines=$(trap '' TERM; wc -l <"$dir/files/numbers")
[ "$lines" = "$count" ] || fail "the file has $lines lines after $count rounds"
last=$(trap '' TERM; tail -n 1 "$dir/files/numbers")
[ "$last" = "$count" ] || fail "the last line is $last after $count rounds"
echo PASS >"$dir/result.new"
mv "$dir/result.new" "$dir/result"
exit 0
