# On the serial console nothing else says what the terminal is: the kernel's command line may (TERM=xterm).
if [ "$(tty)" = /dev/ttyS0 ]; then
    read -r cmdline < /proc/cmdline
    for word in $cmdline; do
        case $word in TERM=*) export "$word" ;; esac
    done
    unset word cmdline
fi
