package lossynet

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

const (
	deviceName  = "link"
	mtu         = 1500    // bytes of a packet, as on Ethernet
	deviceQueue = 1 << 14 // packets: more than a window of any connection, so that the device loses nothing unless it is flooded
)

// newHost moves the calling thread, for good, into a new namespace with a loopback device and a TUN device of this address, and returns the namespace and the TUN device.
func newHost(addr netip.Addr) (namespace, tun *os.File, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, nil, fmt.Errorf("make a network namespace: %w", err)
	}
	if namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, nil, fmt.Errorf("open the namespace: %w", err)
	}
	if tun, err = newTUN(); err == nil {
		if err = configure(addr); err == nil {
			return namespace, tun, nil
		}
		_ = tun.Close()
	}
	_ = namespace.Close()
	return nil, nil, err
}

func newTUN() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	if err := attach(fd); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make a TUN device: %w", err)
	}
	return os.NewFile(uintptr(fd), deviceName), nil // only now: the poller wants a device
}

func attach(fd int) error {
	r, err := unix.NewIfreq(deviceName)
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
}

// configure gives the device its address, in a network of 256, and sets it and the loopback device up.
func configure(addr netip.Addr) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket to configure devices: %w", err)
	}
	defer unix.Close(socket)
	up := func(r *unix.Ifreq) { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING) }
	for _, step := range []struct {
		device  string
		request uint
		set     func(*unix.Ifreq)
	}{
		{deviceName, unix.SIOCSIFADDR, func(r *unix.Ifreq) { _ = r.SetInet4Addr(addr.AsSlice()) }}, // fails for what is not IPv4 only
		{deviceName, unix.SIOCSIFNETMASK, func(r *unix.Ifreq) { _ = r.SetInet4Addr([]byte{255, 255, 255, 0}) }},
		{deviceName, unix.SIOCSIFMTU, func(r *unix.Ifreq) { r.SetUint32(mtu) }},
		{deviceName, unix.SIOCSIFTXQLEN, func(r *unix.Ifreq) { r.SetUint32(deviceQueue) }},
		{deviceName, unix.SIOCSIFFLAGS, up},
		{"lo", unix.SIOCSIFFLAGS, up},
	} {
		r, err := unix.NewIfreq(step.device)
		if err != nil {
			return err
		}
		step.set(r)
		if err := unix.IoctlIfreq(socket, step.request, r); err != nil {
			return fmt.Errorf("configure device %s (request %#x): %w", step.device, step.request, err)
		}
	}
	return nil
}
