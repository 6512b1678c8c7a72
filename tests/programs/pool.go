// Goroutines that make garbage, talk over channels and a pipe, and wait for timers. They go round and round
// through the same seeds, which must give the same results, until there is a file `enough`.
package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"
)

const seeds = 60

type node struct {
	value       uint64
	left, right *node
}

func grow(value uint64, depth int) *node {
	if depth == 0 {
		return &node{value: value}
	}
	return &node{value, grow(value*31+1, depth-1), grow(value*17+2, depth-1)}
}

func (n *node) sum() uint64 {
	if n.left == nil {
		return n.value
	}
	return n.value + (n.left.sum() ^ n.right.sum())
}

type result struct {
	unit int
	hash [32]byte
}

func unit(number int) result {
	words := map[string]uint64{}
	sum := grow(uint64(number), 13).sum()
	for i := uint64(0); i < 5000; i++ {
		words["word"+strconv.FormatUint(i*sum%97, 10)] += i
	}
	text := fmt.Sprint(sum, words)
	return result{number, sha256.Sum256([]byte(text))}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func main() {
	progress, err := os.Create("progress")
	check(err)
	reader, writer, err := os.Pipe()
	check(err)
	work, results := make(chan int), make(chan result, 4)
	var workers sync.WaitGroup
	for i := 0; i < 6; i++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for number := range work {
				results <- unit(number)
				time.Sleep(time.Millisecond)
			}
		}()
	}
	go func() {
		for number := 0; number < seeds || !exists("enough"); number++ {
			work <- number % seeds
		}
		close(work)
		workers.Wait()
		close(results)
	}()
	ticks := 0
	ticker := time.NewTicker(2 * time.Millisecond)
	kept := map[int][32]byte{}
	echoed := make(chan int)
	go func() {
		lines := 0
		for scanner := bufio.NewScanner(reader); scanner.Scan(); lines++ {
		}
		echoed <- lines
	}()
	done := 0
	for results != nil {
		select {
		case <-ticker.C:
			ticks++
		case one, more := <-results:
			if !more {
				results = nil
				break
			}
			if before, known := kept[one.unit]; known && before != one.hash {
				panic(fmt.Sprint("seed ", one.unit, " has another result now"))
			}
			kept[one.unit] = one.hash
			done++
			_, err := fmt.Fprintf(progress, "%9d\n", done)
			check(err)
			_, err = fmt.Fprintln(writer, done)
			check(err)
		}
	}
	check(writer.Close())
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	if ticks == 0 || stats.NumGC == 0 {
		panic(fmt.Sprint("ticks ", ticks, " collections ", stats.NumGC))
	}
	if lines := <-echoed; lines != done {
		panic(fmt.Sprint(lines, " lines came through the pipe of ", done))
	}
	for seed := 0; seed < seeds; seed++ {
		fmt.Printf("%d: %x\n", seed, kept[seed])
	}
}
