# Reads words from a child through a pipe, counts them, and is interrupted by a timer all along.
use strict;
use warnings;
use Digest::MD5 qw(md5_hex);
use IO::Handle;
use Time::HiRes qw(setitimer ITIMER_REAL usleep);

my $ticks = 0;
$SIG{ALRM} = sub { $ticks++ };
setitimer(ITIMER_REAL, 0.003, 0.003);
open(my $progress, '>', 'progress') or die "progress: $!";
$progress->autoflush(1);

my $child = open(my $words, '-|') // die "fork: $!";
if (!$child) {
    my $seed = 1;
    for my $number (1 .. 120000) {
        $seed = ($seed * 69069 + 1) % 4294967296;
        print "word", $seed % 997, "\n";
    }
    exit 7;
}
my (%count, $text, $lines);
while (my $word = <$words>) {
    chomp $word;
    $count{$word}++;
    $text = md5_hex(($text // '') . $word);
    if (++$lines % 500 == 0) {
        print $progress "$lines\n";
        # The timer interrupts every sleep, so this is five pauses of at most 3 ms.
        usleep(3000) for 1 .. 5;
    }
}
close($words);
print "child ", $? >> 8, ", $lines lines, ", scalar(keys %count), " words, $text\n";
print "$_ $count{$_}\n" for sort keys %count;
die "the timer never ticked" unless $ticks > 10;

# Perl takes its handlers back at its end; a tick that comes then would be deadly.
setitimer(ITIMER_REAL, 0);
