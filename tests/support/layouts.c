// Prints what the installed headers say, a line each: "size STRUCT BYTES", "offset STRUCT FIELD BYTES", "value NAME
// NUMBER". What the headers are too old for is left out: a macro by #ifdef, a struct by a macro that came with it.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <linux/prctl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/vfs.h>

#define SIZE(type) printf("size " #type " %zu\n", sizeof(struct type))
#define OFFSET(type, field) printf("offset " #type " " #field " %zu\n", offsetof(struct type, field))
#define VALUE(name) printf("value " #name " %llu\n", (unsigned long long)(name))

int main(void) {
    SIZE(uffdio_api); OFFSET(uffdio_api, api); OFFSET(uffdio_api, features); OFFSET(uffdio_api, ioctls);
    SIZE(uffdio_range); OFFSET(uffdio_range, start); OFFSET(uffdio_range, len);
    SIZE(uffdio_register); OFFSET(uffdio_register, range.start); OFFSET(uffdio_register, range.len);
    OFFSET(uffdio_register, mode); OFFSET(uffdio_register, ioctls);
    SIZE(uffdio_copy); OFFSET(uffdio_copy, dst); OFFSET(uffdio_copy, src); OFFSET(uffdio_copy, len);
    OFFSET(uffdio_copy, mode); OFFSET(uffdio_copy, copy);
    SIZE(uffdio_zeropage); OFFSET(uffdio_zeropage, range.start); OFFSET(uffdio_zeropage, mode);
    OFFSET(uffdio_zeropage, zeropage);
    SIZE(uffdio_continue); OFFSET(uffdio_continue, range.start); OFFSET(uffdio_continue, mode);
    OFFSET(uffdio_continue, mapped);
    SIZE(uffdio_writeprotect); OFFSET(uffdio_writeprotect, range.start); OFFSET(uffdio_writeprotect, mode);
    SIZE(uffd_msg); OFFSET(uffd_msg, event); OFFSET(uffd_msg, arg.pagefault.flags);
    OFFSET(uffd_msg, arg.pagefault.address); OFFSET(uffd_msg, arg.pagefault.feat.ptid);
    OFFSET(uffd_msg, arg.remap.from); OFFSET(uffd_msg, arg.remap.to); OFFSET(uffd_msg, arg.remap.len);
    OFFSET(uffd_msg, arg.remove.start); OFFSET(uffd_msg, arg.remove.end); OFFSET(uffd_msg, arg.fork.ufd);
    VALUE(UFFD_API); VALUE(UFFDIO_API); VALUE(UFFDIO_REGISTER); VALUE(UFFDIO_UNREGISTER); VALUE(UFFDIO_WAKE);
    VALUE(UFFDIO_COPY); VALUE(UFFDIO_ZEROPAGE); VALUE(UFFDIO_WRITEPROTECT); VALUE(UFFDIO_CONTINUE);
    VALUE(UFFD_EVENT_PAGEFAULT); VALUE(UFFD_EVENT_FORK); VALUE(UFFD_EVENT_REMAP); VALUE(UFFD_EVENT_REMOVE);
    VALUE(UFFD_EVENT_UNMAP);
    VALUE(UFFD_PAGEFAULT_FLAG_WRITE); VALUE(UFFD_PAGEFAULT_FLAG_WP); VALUE(UFFD_PAGEFAULT_FLAG_MINOR);
    VALUE(UFFDIO_REGISTER_MODE_MISSING); VALUE(UFFDIO_REGISTER_MODE_WP); VALUE(UFFDIO_REGISTER_MODE_MINOR);
    VALUE(UFFDIO_COPY_MODE_DONTWAKE); VALUE(UFFDIO_COPY_MODE_WP);
    VALUE(_UFFDIO_WAKE); VALUE(_UFFDIO_COPY); VALUE(_UFFDIO_ZEROPAGE); VALUE(_UFFDIO_WRITEPROTECT);
    VALUE(_UFFDIO_CONTINUE);
    VALUE(UFFD_FEATURE_PAGEFAULT_FLAG_WP); VALUE(UFFD_FEATURE_EVENT_FORK); VALUE(UFFD_FEATURE_EVENT_REMAP);
    VALUE(UFFD_FEATURE_EVENT_REMOVE); VALUE(UFFD_FEATURE_MISSING_HUGETLBFS); VALUE(UFFD_FEATURE_MISSING_SHMEM);
    VALUE(UFFD_FEATURE_EVENT_UNMAP); VALUE(UFFD_FEATURE_SIGBUS); VALUE(UFFD_FEATURE_THREAD_ID);
    VALUE(UFFD_FEATURE_MINOR_HUGETLBFS); VALUE(UFFD_FEATURE_MINOR_SHMEM);
#ifdef USERFAULTFD_IOC_NEW
    VALUE(USERFAULTFD_IOC_NEW); VALUE(UFFD_FEATURE_EXACT_ADDRESS); VALUE(UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
#endif
#ifdef UFFD_FEATURE_WP_UNPOPULATED
    VALUE(UFFD_FEATURE_WP_UNPOPULATED);
#endif
#ifdef UFFDIO_POISON
    SIZE(uffdio_poison); OFFSET(uffdio_poison, updated);
    VALUE(UFFDIO_POISON); VALUE(_UFFDIO_POISON); VALUE(UFFD_FEATURE_POISON);
#endif
#ifdef UFFD_FEATURE_WP_ASYNC
    VALUE(UFFD_FEATURE_WP_ASYNC);
#endif
#ifdef UFFDIO_MOVE
    SIZE(uffdio_move); OFFSET(uffdio_move, move);
    VALUE(UFFDIO_MOVE); VALUE(_UFFDIO_MOVE); VALUE(UFFD_FEATURE_MOVE);
#endif
#ifdef UFFDIO_RWPROTECT
    SIZE(uffdio_rwprotect); OFFSET(uffdio_rwprotect, mode);
    VALUE(UFFD_PAGEFAULT_FLAG_RWP); VALUE(UFFDIO_RWPROTECT); VALUE(_UFFDIO_RWPROTECT); VALUE(UFFDIO_REGISTER_MODE_RWP);
    VALUE(UFFD_FEATURE_RWP); VALUE(UFFD_FEATURE_RWP_ASYNC);
#endif
#ifdef UFFDIO_SET_MODE
    SIZE(uffdio_set_mode); OFFSET(uffdio_set_mode, enable); OFFSET(uffdio_set_mode, disable);
    VALUE(UFFDIO_SET_MODE);
#endif
#ifdef PAGEMAP_SCAN
    SIZE(pm_scan_arg); OFFSET(pm_scan_arg, flags); OFFSET(pm_scan_arg, start); OFFSET(pm_scan_arg, end);
    OFFSET(pm_scan_arg, walk_end); OFFSET(pm_scan_arg, vec); OFFSET(pm_scan_arg, vec_len);
    OFFSET(pm_scan_arg, max_pages); OFFSET(pm_scan_arg, category_inverted); OFFSET(pm_scan_arg, category_mask);
    OFFSET(pm_scan_arg, category_anyof_mask); OFFSET(pm_scan_arg, return_mask);
    VALUE(PAGEMAP_SCAN); VALUE(PM_SCAN_WP_MATCHING); VALUE(PM_SCAN_CHECK_WPASYNC);
    VALUE(PAGE_IS_WPALLOWED); VALUE(PAGE_IS_WRITTEN); VALUE(PAGE_IS_FILE); VALUE(PAGE_IS_PRESENT);
    VALUE(PAGE_IS_SWAPPED); VALUE(PAGE_IS_PFNZERO); VALUE(PAGE_IS_HUGE);
#endif
#ifdef PAGE_IS_SOFT_DIRTY
    VALUE(PAGE_IS_SOFT_DIRTY);
#endif
    SIZE(user_regs_struct); OFFSET(user_regs_struct, r15); OFFSET(user_regs_struct, r12);
    OFFSET(user_regs_struct, r10); OFFSET(user_regs_struct, r9); OFFSET(user_regs_struct, r8);
    OFFSET(user_regs_struct, rax); OFFSET(user_regs_struct, rdx); OFFSET(user_regs_struct, rsi);
    OFFSET(user_regs_struct, rdi); OFFSET(user_regs_struct, orig_rax); OFFSET(user_regs_struct, rip);
    OFFSET(user_regs_struct, rsp); OFFSET(user_regs_struct, gs);
    VALUE(PTRACE_CONT); VALUE(PTRACE_SINGLESTEP); VALUE(PTRACE_GETREGS); VALUE(PTRACE_SETREGS);
    VALUE(PTRACE_DETACH); VALUE(PTRACE_SEIZE); VALUE(PTRACE_INTERRUPT); VALUE(PTRACE_GETSIGMASK);
    VALUE(PTRACE_SETSIGMASK);
    VALUE(SYS_userfaultfd); VALUE(SYS_close); VALUE(SYS_mmap); VALUE(SYS_munmap); VALUE(SYS_ioctl);
    VALUE(SYS_recvmsg); VALUE(SYS_socketpair); VALUE(SYS_tgkill); VALUE(SYS_process_madvise);
    VALUE(SYS_pidfd_open); VALUE(SYS_pidfd_getfd); VALUE(SYS_pidfd_send_signal);
    OFFSET(tcp_info, tcpi_state); OFFSET(tcp_info, tcpi_rtt); OFFSET(tcp_info, tcpi_total_retrans);
    OFFSET(tcp_info, tcpi_pacing_rate); OFFSET(tcp_info, tcpi_bytes_acked); OFFSET(tcp_info, tcpi_notsent_bytes);
    OFFSET(tcp_info, tcpi_min_rtt); OFFSET(tcp_info, tcpi_delivery_rate);
    VALUE(SO_MAX_PACING_RATE);
    VALUE(TUNSETIFF); VALUE(SIOCGIFFLAGS); VALUE(SIOCSIFFLAGS); VALUE(SIOCBRADDIF);
    VALUE(IFF_UP); VALUE(IFF_TAP); VALUE(IFF_NO_PI); VALUE(IFF_VNET_HDR);
    VALUE(MADV_WILLNEED); VALUE(MADV_COLD); VALUE(MADV_PAGEOUT);
#ifdef MADV_COLLAPSE
    VALUE(MADV_COLLAPSE);
#endif
    VALUE(FALLOC_FL_KEEP_SIZE); VALUE(FALLOC_FL_PUNCH_HOLE);
    VALUE(PR_SET_PDEATHSIG); VALUE(PR_SET_NAME);
    SIZE(statfs); OFFSET(statfs, f_type); OFFSET(statfs, f_bsize);
    VALUE(TMPFS_MAGIC); VALUE(HUGETLBFS_MAGIC);
    VALUE(EXT4_SUPER_MAGIC); VALUE(XFS_SUPER_MAGIC); VALUE(BTRFS_SUPER_MAGIC);
    SIZE(fiemap); OFFSET(fiemap, fm_flags); OFFSET(fiemap, fm_mapped_extents); OFFSET(fiemap, fm_extent_count);
    SIZE(fiemap_extent); OFFSET(fiemap_extent, fe_logical); OFFSET(fiemap_extent, fe_length);
    OFFSET(fiemap_extent, fe_flags); VALUE(FS_IOC_FIEMAP);
    VALUE(FIEMAP_EXTENT_LAST); VALUE(FIEMAP_EXTENT_UNKNOWN); VALUE(FIEMAP_EXTENT_DELALLOC);
    VALUE(FIEMAP_EXTENT_UNWRITTEN); VALUE(FIEMAP_EXTENT_SHARED);
    SIZE(file_clone_range); OFFSET(file_clone_range, src_offset); OFFSET(file_clone_range, dest_offset);
    VALUE(FICLONERANGE);
    VALUE(MFD_HUGETLB); VALUE(MFD_HUGE_2MB); VALUE(MFD_HUGE_1GB);
    return 0;
}
