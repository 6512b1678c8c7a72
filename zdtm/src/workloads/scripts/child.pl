# Perl: a big hash, a file read half, and a child that answers through a pipe.
use strict;
use warnings;
use IO::Handle;

my $dir = $ARGV[0];

sub verdict {
    my ($text, $code) = @_;
    open(my $out, '>', "$dir/result.new") or exit 3;
    print $out "$text\n";
    close $out;
    rename "$dir/result.new", "$dir/result";
    exit $code;
}

sub fail { verdict("FAIL: $_[0]", 1) }

my %squares = map { $_ => $_ * $_ } 1 .. 20_000;
open(my $file, '+>', "$dir/files/lines") or fail("cannot open a file: $!");
$file->autoflush(1);
print $file "line $_\n" for 1 .. 100;
seek($file, 0, 0);
my $first = <$file>;

pipe(my $from_parent, my $to_child) or fail("no pipe: $!");
pipe(my $from_child, my $to_parent) or fail("no pipe: $!");
my $parent = $$;
my $child = fork();
defined $child or fail("no fork: $!");
if ($child == 0) {
    close $to_child;
    close $from_child;
    $to_parent->autoflush(1);
    print $to_parent "up\n";
    while (my $line = <$from_parent>) {
        chomp $line;
        print $to_parent "$line from $parent\n";
    }
    exit 5;
}
close $from_parent;
close $to_parent;
$to_child->autoflush(1);
my $up = <$from_child> // '';
$up eq "up\n" or fail("the child began with '$up'");
print $to_child "hello\n";
# Its answer stays in the pipe, and it is back where it waits for the next line.
vec(my $answered = '', fileno($from_child), 1) = 1;
select($answered, undef, undef, 30) == 1 or fail("the child does not answer");

my $stop = 0;
$SIG{TERM} = sub { $stop = 1 };
open(my $ready, '>', "$dir/ready") or fail("cannot say ready: $!");
close $ready;
select(undef, undef, undef, 0.01) until $stop;

my $answer = <$from_child> // '';
$answer eq "hello from $$\n" or fail("the child answered '$answer'");
print $to_child "again\n";
$answer = <$from_child> // '';
$answer eq "again from $$\n" or fail("the child answered '$answer' the second time");
close $to_child;
waitpid($child, 0) == $child or fail("the child cannot be waited for");
($? >> 8) == 5 or fail("the child ended with $?");
for my $n (1 .. 20_000) {
    $squares{$n} == $n * $n or fail("the square of $n is $squares{$n}");
}
my $next = <$file> // '';
$next eq "line 2\n" or fail("the file goes on with '$next' after '$first'");
verdict('PASS', 0);
