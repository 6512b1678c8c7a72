# A line server as mail servers are: forks for every client, answers each line with its number and its text.
use strict;
use warnings;
use IO::Socket::INET;

$| = 1;
my $server = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 0, Listen => 64, ReuseAddr => 1)
    or die "cannot listen: $!";
$SIG{CHLD} = 'IGNORE';
print 'port ', $server->sockport, "\n";
while (1) {
    my $client = $server->accept or next;
    my $pid = fork;
    die "cannot fork: $!" unless defined $pid;
    if ($pid) {
        close $client;
        next;
    }
    close $server;
    $client->autoflush(1);
    my $number = 0;
    while (my $line = <$client>) {
        $number++;
        print $client "$number $line";
    }
    exit 0;
}
