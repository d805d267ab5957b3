// SPDX-License-Identifier: GPL-2.0-or-later
/* Virtual machines that are unhooked, closed and made again all the time. */
#include "executor.h"

struct image images[IMAGES];
struct vm vms[VMS];
atomic_uint restarts;

/* Making one takes as long as a short case: those that no case changed for good serve again. */
static struct vm idle[IMAGES];
static int kvm;
static size_t run_size;
static struct {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 entries[128];
} cpuid;

static void reset_vcpu(struct vcpu *vcpu)
{
	const struct image *image = vcpu->vm->image;
	struct kvm_vcpu_events events = { 0 };

	/* Also an exception that the CPU refuses to inject. */
	ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events);
	ioctl(vcpu->fd, KVM_SET_SREGS, &vcpu->sregs);
	ioctl(vcpu->fd, KVM_SET_REGS, &image->regs[vcpu->index]);
}

static void restore_memory(struct vm *vm)
{
	for (unsigned int i = 0; i < vm->image->chunks; i++)
		memcpy(vm->memory + vm->image->chunk[i].at, vm->image->chunk[i].data,
		       vm->image->chunk[i].size);
}

/* A guest that went astray starts again, so that vCPUs keep running whatever is done to them. */
static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = argument;

	while (!vcpu->stop) {
		int r = ioctl(vcpu->fd, KVM_RUN, 0);

		if (r < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (r >= 0 && (vcpu->run->exit_reason == KVM_EXIT_IO ||
			       vcpu->run->exit_reason == KVM_EXIT_MMIO ||
			       vcpu->run->exit_reason == KVM_EXIT_DEBUG))
			continue;
		if (r < 0 || vcpu->run->exit_reason != KVM_EXIT_HLT) {
			restarts++;
			restore_memory(vcpu->vm);
			reset_vcpu(vcpu);
		}
		usleep(3000);
	}
	vcpu->ended = true;
	return NULL;
}

int start_vcpu(struct vcpu *vcpu)
{
	if (vcpu->fd < 0 || vcpu->started)
		return EBADF;
	vcpu->stop = false;
	vcpu->ended = false;
	vcpu->run->immediate_exit = 0;
	if (pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu))
		return EAGAIN;
	vcpu->started = true;
	return 0;
}

/*
 * The signal may come before the ioctl: ask until it is over. A vCPU that waits for the tool
 * to answer an event does not come for a signal, only when the session ends: give up then.
 */
int stop_vcpu(struct vcpu *vcpu)
{
	uint64_t until = now_ms() + STOP_MS;

	if (!vcpu->started)
		return EBADF;
	vcpu->stop = true;
	while (!vcpu->ended) {
		if (now_ms() > until)
			return ETIMEDOUT;
		vcpu->run->immediate_exit = 1;
		pthread_kill(vcpu->thread, SIGUSR1);
		usleep(200);
	}
	pthread_join(vcpu->thread, NULL);
	vcpu->started = false;
	return 0;
}

/* Whatever it waits for; only the kernel can keep us here. */
static void end_vcpu(struct vcpu *vcpu)
{
	while (stop_vcpu(vcpu) == ETIMEDOUT) {
		set_parameter(true);
		ioctl(vcpu->vm->fd, unhook_request, 0);
	}
}

static void release_vm(struct vm *vm)
{
	int fd = vm->fd;

	vm->fd = -1;
	for (unsigned int i = 0; i < vm->vcpus; i++) {
		munmap(vm->vcpu[i].run, run_size);
		close(vm->vcpu[i].fd);
		vm->vcpu[i].fd = -1;
	}
	close(fd);
	munmap(vm->memory, vm->image->memory);
}

int close_vm(struct vm *vm)
{
	if (vm->fd < 0)
		return EBADF;
	for (unsigned int i = 0; i < vm->vcpus; i++)
		end_vcpu(&vm->vcpu[i]);
	release_vm(vm);
	return 0;
}

int set_memory(struct vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
		      uint64_t offset)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)vm->memory + offset,
	};

	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? errno : 0;
}

/* All but the lock, which belongs to the place. */
static void copy_vm(struct vm *to, const struct vm *from)
{
	to->image = from->image;
	to->memory = from->memory;
	to->vcpus = from->vcpus;
	to->uses = from->uses;
	for (unsigned int i = 0; i < from->vcpus; i++) {
		to->vcpu[i] = from->vcpu[i];
		to->vcpu[i].vm = to;
	}
	to->fd = from->fd;
}

/* Stopped, unhooked and as if it had just been made, as far as cases can tell. */
void park_vm(struct vm *vm)
{
	struct kvm_mp_state runnable = { KVM_MP_STATE_RUNNABLE };
	struct vm *place = &idle[vm->image - images];

	for (unsigned int i = 0; i < vm->vcpus; i++)
		end_vcpu(&vm->vcpu[i]);
	if (place->fd >= 0 || ++vm->uses > 50 || vm->image->irqchip) {
		release_vm(vm);
		return;
	}
	set_memory(vm, 0, 0, 0, vm->image->memory, 0);
	set_memory(vm, 1, 0, 0, 0, 0);
	restore_memory(vm);
	for (unsigned int i = 0; i < vm->vcpus; i++) {
		ioctl(vm->vcpu[i].fd, KVM_SET_MP_STATE, &runnable);
		reset_vcpu(&vm->vcpu[i]);
	}
	copy_vm(place, vm);
	vm->fd = -1;
}

void forget_idle(void)
{
	for (struct vm *vm = idle; vm < idle + IMAGES; vm++)
		if (vm->fd >= 0)
			release_vm(vm);
}

static bool take_idle(struct vm *vm, const struct image *image)
{
	struct vm *place = &idle[image - images];

	if (place->fd < 0)
		return false;
	copy_vm(vm, place);
	place->fd = -1;
	return true;
}

int make_vm(struct vm *vm, const struct image *image, bool reuse)
{
	uint64_t identity = 0xfffbc000;
	int fd;

	if (vm->fd >= 0)
		return EEXIST;
	if (reuse && take_idle(vm, image))
		return 0;
	vm->image = image;
	vm->vcpus = vm->uses = 0;
	vm->memory = mmap(NULL, image->memory, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (vm->memory == MAP_FAILED)
		die("memory of a guest");
	restore_memory(vm);
	fd = ioctl(kvm, KVM_CREATE_VM, 0);
	if (fd < 0)
		return errno;
	vm->fd = fd;
	if (ioctl(fd, KVM_SET_IDENTITY_MAP_ADDR, &identity) || ioctl(fd, KVM_SET_TSS_ADDR, 0xfffbd000) ||
	    (image->irqchip && ioctl(fd, KVM_CREATE_IRQCHIP, 0)) ||
	    set_memory(vm, 0, 0, 0, image->memory, 0))
		die("a virtual machine");
	for (unsigned int i = 0; i < image->vcpus; i++) {
		struct vcpu *vcpu = &vm->vcpu[i];

		vcpu->vm = vm;
		vcpu->index = i;
		vcpu->started = false;
		vcpu->fd = ioctl(fd, KVM_CREATE_VCPU, i);
		if (vcpu->fd < 0)
			die("a vCPU");
		vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
		if (vcpu->run == MAP_FAILED || ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid) ||
		    ioctl(vcpu->fd, KVM_GET_SREGS, &vcpu->sregs))
			die("a vCPU");
		for (unsigned int j = 0; j < image->patches[i]; j++)
			memcpy((char *)&vcpu->sregs + image->patch[i][j].at,
			       image->patch[i][j].data, image->patch[i][j].size);
		reset_vcpu(vcpu);
		vm->vcpus++;
	}
	return 0;
}

void open_kvm(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	cpuid.head.nent = 128;
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid))
		die("CPUID");
	for (struct vm *vm = vms; vm < vms + VMS; vm++) {
		pthread_mutex_init(&vm->lock, NULL);
		vm->fd = -1;
		for (unsigned int i = 0; i < VCPUS; i++)
			vm->vcpu[i].fd = -1;
	}
	for (unsigned int i = 0; i < IMAGES; i++)
		idle[i].fd = -1;
}

int kvm_fd(void)
{
	return kvm;
}
