# Counts, sorts and formats the words of a text: hashes, regular expressions, strings, a sort with a function of its own.
use strict;
use warnings;

my (%count, %next, $before);
while (my $line = <STDIN>) {
    chomp $line;
    for my $word (split /\s+/, $line) {
        $count{$word}++;
        $next{$before}{$word}++ if defined $before && $word =~ /^of(\d+)/;
        $before = $word;
    }
}
for my $word (sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count) {
    (my $shown = $word) =~ s/([0-9a-f]{2})/<$1>/g;
    printf "%-24s %6d %6d %s\n", $shown, $count{$word}, scalar keys %{ $next{$word} || {} }, ucfirst reverse $word;
}
