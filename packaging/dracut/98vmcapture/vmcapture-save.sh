#!/bin/sh
# Hook of dracut, sourced when udev has had its time, and before an emergency shell: see hand-over in the image.
/vmcapture/busybox sh /vmcapture/hand-over save
