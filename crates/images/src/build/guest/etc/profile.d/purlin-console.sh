# On a console nothing else says what the terminal is: the kernel's command line may (TERM=xterm).
case $(tty) in /dev/ttyS0 | /dev/hvc0)
    read -r cmdline < /proc/cmdline
    for word in $cmdline; do
        case $word in TERM=*) export "$word" ;; esac
    done
    unset word cmdline
    ;;
esac
