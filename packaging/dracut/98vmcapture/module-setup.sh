#!/bin/bash
# Module of dracut: puts our parts into the image, and the kernel modules that they ask for. They were made already when
# `vmcapture initramfs` runs dracut. A failure ends dracut.

# Only with --add vmcapture: the machine's own initrd is none of our business.
check() {
    return 255
}

depends() {
    echo base udev-rules
}

install() {
    if [[ $VMCAPTURE_PARTS ]]; then
        cp -a "$VMCAPTURE_PARTS/vmcapture" "$initdir/"
    else
        PATH=$PATH:/usr/local/sbin:/usr/local/bin vmcapture initramfs --quiet --kernel "$kernel" --into "$initdir"
    fi || {
        dfatal "vmcapture: its parts are not in the image"
        exit 1
    }
    inst_hook cmdline 00 "$moddir/vmcapture-root.sh"
    inst_hook pre-udev 00 "$moddir/vmcapture-modules.sh"
    # Not among the jobs for a udev that has settled: behind a disk that hangs it never does.
    inst_hook initqueue 00 "$moddir/vmcapture-save.sh"
    inst_hook initqueue/finished 00 "$moddir/vmcapture-unfinished.sh"
    inst_hook emergency 00 "$moddir/vmcapture-save.sh"
    dracut_need_initqueue
}

# Whatever --hostonly makes of the driver of a disk that is not attached now, or of a watchdog; and whatever the machine's own
# initrd is to be without (omit_drivers): dracut says nothing of what it leaves out.
installkernel() {
    local module options
    while read -r module options; do
        hostonly='' omit_drivers='' instmods -c "$module" || return 1
    done < "$initdir/vmcapture/modules"
}
