#!/bin/sh
# The demo's world: a program counts in threads, writes a diary, and tells each number to a listener
# through a pipe; the listener writes down what it heard.
"$FIRN" demo-world count | while read -r number; do
    echo "$number" >> heard
done
