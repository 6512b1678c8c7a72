# A tmux server, and a client of it on a terminal of `script`, in one tree.
export TERM=xterm
unset TMUX
tmux -S socket -f /dev/null -D &
until [ -S socket ]; do sleep 0.05; done
session='tmux -S socket -f /dev/null new-session -s s -x 90 -y 30 bash --norc --noprofile'
# Of an input that ends, `script` makes a ^D, and the shell may be the one that reads it.
mkfifo input
script -q -f -c "touch attached; stty rows 31 cols 90; exec $session" typescript <> input > /dev/null
wait
