//! The ublk driver's interface (`linux/ublk_cmd.h` of Linux 7.x) as Rust constants and structs, for 64-bit
//! little-endian machines.
//!
//! Stands in for the crate of this name from the registry, which is the same but makes its bindings with
//! bindgen at each build and so needs libclang on every machine: with this one a Rust toolchain is
//! enough. The constants and structs below are bindgen's output, without the header's comments; the
//! assertions on sizes and offsets are its own. `ublk_params` goes on to the end that the kernel's has
//! had since 6.15: cut off before `dma`, as the registry's is, its last bytes are padding, with
//! whatever lay there, and the kernel takes them for the DMA alignment. Only `libublk` should use this crate by name.

#![allow(
    non_upper_case_globals,
    non_camel_case_types,
    non_snake_case,
    dead_code,
    missing_docs,
    clippy::all,
    clippy::pedantic,
    reason = "generated from a C header"
)]

/// What an SQE's `addr` says of automatic buffer registration.
pub fn ublk_sqe_addr_to_auto_buf_reg(addr: u64) -> ublk_auto_buf_reg {
    ublk_auto_buf_reg {
        index: addr as u16,
        flags: (addr >> 16) as u8,
        reserved0: (addr >> 24) as u8,
        reserved1: (addr >> 32) as u32,
    }
}

/// An SQE's `addr` that says it.
pub fn ublk_auto_buf_reg_to_sqe_addr(register: &ublk_auto_buf_reg) -> u64 {
    u64::from(register.index)
        | u64::from(register.flags) << 16
        | u64::from(register.reserved0) << 24
        | u64::from(register.reserved1) << 32
}

use serde::{Deserialize, Serialize};
pub const UBLK_CMD_GET_QUEUE_AFFINITY: u32 = 1;
pub const UBLK_CMD_GET_DEV_INFO: u32 = 2;
pub const UBLK_CMD_ADD_DEV: u32 = 4;
pub const UBLK_CMD_DEL_DEV: u32 = 5;
pub const UBLK_CMD_START_DEV: u32 = 6;
pub const UBLK_CMD_STOP_DEV: u32 = 7;
pub const UBLK_CMD_SET_PARAMS: u32 = 8;
pub const UBLK_CMD_GET_PARAMS: u32 = 9;
pub const UBLK_CMD_START_USER_RECOVERY: u32 = 16;
pub const UBLK_CMD_END_USER_RECOVERY: u32 = 17;
pub const UBLK_CMD_GET_DEV_INFO2: u32 = 18;
pub const UBLK_SHMEM_BUF_READ_ONLY: u32 = 1;
pub const UBLK_FEATURES_LEN: u32 = 8;
pub const UBLK_IO_FETCH_REQ: u32 = 32;
pub const UBLK_IO_COMMIT_AND_FETCH_REQ: u32 = 33;
pub const UBLK_IO_NEED_GET_DATA: u32 = 34;
pub const UBLK_IO_RES_OK: u32 = 0;
pub const UBLK_IO_RES_NEED_GET_DATA: u32 = 1;
pub const UBLK_IO_RES_ABORT: i32 = -19;
pub const UBLKSRV_CMD_BUF_OFFSET: u32 = 0;
pub const UBLKSRV_IO_BUF_OFFSET: u32 = 2147483648;
pub const UBLK_MAX_QUEUE_DEPTH: u32 = 4096;
pub const UBLK_IO_BUF_OFF: u32 = 0;
pub const UBLK_IO_BUF_BITS: u32 = 25;
pub const UBLK_IO_BUF_BITS_MASK: u32 = 33554431;
pub const UBLK_TAG_OFF: u32 = 25;
pub const UBLK_TAG_BITS: u32 = 16;
pub const UBLK_TAG_BITS_MASK: u32 = 65535;
pub const UBLK_QID_OFF: u32 = 41;
pub const UBLK_QID_BITS: u32 = 12;
pub const UBLK_QID_BITS_MASK: u32 = 4095;
pub const UBLK_MAX_NR_QUEUES: u32 = 4096;
pub const UBLKSRV_IO_BUF_TOTAL_BITS: u32 = 53;
pub const UBLKSRV_IO_BUF_TOTAL_SIZE: u64 = 9007199254740992;
pub const UBLK_F_SUPPORT_ZERO_COPY: u32 = 1;
pub const UBLK_F_URING_CMD_COMP_IN_TASK: u32 = 2;
pub const UBLK_F_NEED_GET_DATA: u32 = 4;
pub const UBLK_F_USER_RECOVERY: u32 = 8;
pub const UBLK_F_USER_RECOVERY_REISSUE: u32 = 16;
pub const UBLK_F_UNPRIVILEGED_DEV: u32 = 32;
pub const UBLK_F_CMD_IOCTL_ENCODE: u32 = 64;
pub const UBLK_F_USER_COPY: u32 = 128;
pub const UBLK_F_ZONED: u32 = 256;
pub const UBLK_F_USER_RECOVERY_FAIL_IO: u32 = 512;
pub const UBLK_F_UPDATE_SIZE: u32 = 1024;
pub const UBLK_F_AUTO_BUF_REG: u32 = 2048;
pub const UBLK_F_QUIESCE: u32 = 4096;
pub const UBLK_F_PER_IO_DAEMON: u32 = 8192;
pub const UBLK_F_BUF_REG_OFF_DAEMON: u32 = 16384;
pub const UBLK_F_BATCH_IO: u32 = 32768;
pub const UBLK_F_INTEGRITY: u32 = 65536;
pub const UBLK_F_SAFE_STOP_DEV: u32 = 131072;
pub const UBLK_F_NO_AUTO_PART_SCAN: u32 = 262144;
pub const UBLK_F_SHMEM_ZC: u32 = 524288;
pub const UBLK_S_DEV_DEAD: u32 = 0;
pub const UBLK_S_DEV_LIVE: u32 = 1;
pub const UBLK_S_DEV_QUIESCED: u32 = 2;
pub const UBLK_S_DEV_FAIL_IO: u32 = 3;
pub const UBLK_IO_OP_READ: u32 = 0;
pub const UBLK_IO_OP_WRITE: u32 = 1;
pub const UBLK_IO_OP_FLUSH: u32 = 2;
pub const UBLK_IO_OP_DISCARD: u32 = 3;
pub const UBLK_IO_OP_WRITE_SAME: u32 = 4;
pub const UBLK_IO_OP_WRITE_ZEROES: u32 = 5;
pub const UBLK_IO_OP_ZONE_OPEN: u32 = 10;
pub const UBLK_IO_OP_ZONE_CLOSE: u32 = 11;
pub const UBLK_IO_OP_ZONE_FINISH: u32 = 12;
pub const UBLK_IO_OP_ZONE_APPEND: u32 = 13;
pub const UBLK_IO_OP_ZONE_RESET_ALL: u32 = 14;
pub const UBLK_IO_OP_ZONE_RESET: u32 = 15;
pub const UBLK_IO_OP_REPORT_ZONES: u32 = 18;
pub const UBLK_IO_F_FAILFAST_DEV: u32 = 256;
pub const UBLK_IO_F_FAILFAST_TRANSPORT: u32 = 512;
pub const UBLK_IO_F_FAILFAST_DRIVER: u32 = 1024;
pub const UBLK_IO_F_META: u32 = 2048;
pub const UBLK_IO_F_FUA: u32 = 8192;
pub const UBLK_IO_F_NOUNMAP: u32 = 32768;
pub const UBLK_IO_F_SWAP: u32 = 65536;
pub const UBLK_IO_F_NEED_REG_BUF: u32 = 131072;
pub const UBLK_IO_F_INTEGRITY: u32 = 262144;
pub const UBLK_IO_F_SHMEM_ZC: u32 = 524288;
pub const UBLK_AUTO_BUF_REG_FALLBACK: u32 = 1;
pub const UBLK_AUTO_BUF_REG_F_MASK: u32 = 1;
pub const UBLK_BATCH_F_HAS_ZONE_LBA: u32 = 1;
pub const UBLK_BATCH_F_HAS_BUF_ADDR: u32 = 2;
pub const UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK: u32 = 4;
pub const UBLK_ATTR_READ_ONLY: u32 = 1;
pub const UBLK_ATTR_ROTATIONAL: u32 = 2;
pub const UBLK_ATTR_VOLATILE_CACHE: u32 = 4;
pub const UBLK_ATTR_FUA: u32 = 8;
pub const UBLK_MIN_SEGMENT_SIZE: u32 = 4096;
pub const UBLK_PARAM_TYPE_BASIC: u32 = 1;
pub const UBLK_PARAM_TYPE_DISCARD: u32 = 2;
pub const UBLK_PARAM_TYPE_DEVT: u32 = 4;
pub const UBLK_PARAM_TYPE_ZONED: u32 = 8;
pub const UBLK_PARAM_TYPE_DMA_ALIGN: u32 = 16;
pub const UBLK_PARAM_TYPE_SEGMENT: u32 = 32;
pub const UBLK_SHMEM_ZC_OFF_MASK: u32 = 4294967295;
pub const UBLK_SHMEM_ZC_IDX_OFF: u32 = 32;
pub const UBLK_SHMEM_ZC_IDX_MASK: u32 = 65535;
pub type __u8 = libc::c_uchar;
pub type __u16 = libc::c_ushort;
pub type __s32 = libc::c_int;
pub type __u32 = libc::c_uint;
pub type __u64 = libc::c_ulonglong;
pub const BLK_ZONE_TYPE_CONVENTIONAL: blk_zone_type = 1;
pub const BLK_ZONE_TYPE_SEQWRITE_REQ: blk_zone_type = 2;
pub const BLK_ZONE_TYPE_SEQWRITE_PREF: blk_zone_type = 3;
pub type blk_zone_type = libc::c_uint;
pub const BLK_ZONE_COND_NOT_WP: blk_zone_cond = 0;
pub const BLK_ZONE_COND_EMPTY: blk_zone_cond = 1;
pub const BLK_ZONE_COND_IMP_OPEN: blk_zone_cond = 2;
pub const BLK_ZONE_COND_EXP_OPEN: blk_zone_cond = 3;
pub const BLK_ZONE_COND_CLOSED: blk_zone_cond = 4;
pub const BLK_ZONE_COND_READONLY: blk_zone_cond = 13;
pub const BLK_ZONE_COND_FULL: blk_zone_cond = 14;
pub const BLK_ZONE_COND_OFFLINE: blk_zone_cond = 15;
pub type blk_zone_cond = libc::c_uint;
pub const BLK_ZONE_REP_CAPACITY: blk_zone_report_flags = 1;
pub type blk_zone_report_flags = libc::c_uint;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct blk_zone {
    pub start: __u64,
    pub len: __u64,
    pub wp: __u64,
    pub type_: __u8,
    pub cond: __u8,
    pub non_seq: __u8,
    pub reset: __u8,
    pub resv: [__u8; 4usize],
    pub capacity: __u64,
    pub reserved: [__u8; 24usize],
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct blk_zone_range {
    pub sector: __u64,
    pub nr_sectors: __u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_shmem_buf_reg {
    pub addr: __u64,
    pub len: __u64,
    pub flags: __u32,
    pub reserved: __u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_ctrl_cmd {
    pub dev_id: __u32,
    pub queue_id: __u16,
    pub len: __u16,
    pub addr: __u64,
    pub data: [__u64; 1usize],
    pub dev_path_len: __u16,
    pub pad: __u16,
    pub reserved: __u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_ctrl_dev_info {
    pub nr_hw_queues: __u16,
    pub queue_depth: __u16,
    pub state: __u16,
    pub pad0: __u16,
    pub max_io_buf_bytes: __u32,
    pub dev_id: __u32,
    pub ublksrv_pid: __s32,
    pub pad1: __u32,
    pub flags: __u64,
    pub ublksrv_flags: __u64,
    pub owner_uid: __u32,
    pub owner_gid: __u32,
    pub reserved1: __u64,
    pub reserved2: __u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_io_desc {
    pub op_flags: __u32,
    pub nr_sectors: __u32,
    pub start_sector: __u64,
    pub addr: __u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_auto_buf_reg {
    pub index: __u16,
    pub flags: __u8,
    pub reserved0: __u8,
    pub reserved1: __u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublksrv_io_cmd {
    pub q_id: __u16,
    pub tag: __u16,
    pub result: __s32,
    pub addr: __u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_elem_header {
    pub tag: __u16,
    pub buf_index: __u16,
    pub result: __s32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_batch_io {
    pub q_id: __u16,
    pub flags: __u16,
    pub nr_elem: __u16,
    pub elem_bytes: __u8,
    pub reserved: __u8,
    pub reserved2: __u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_basic {
    pub attrs: __u32,
    pub logical_bs_shift: __u8,
    pub physical_bs_shift: __u8,
    pub io_opt_shift: __u8,
    pub io_min_shift: __u8,
    pub max_sectors: __u32,
    pub chunk_sectors: __u32,
    pub dev_sectors: __u64,
    pub virt_boundary_mask: __u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_discard {
    pub discard_alignment: __u32,
    pub discard_granularity: __u32,
    pub max_discard_sectors: __u32,
    pub max_write_zeroes_sectors: __u32,
    pub max_discard_segments: __u16,
    pub reserved0: __u16,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_devt {
    pub char_major: __u32,
    pub char_minor: __u32,
    pub disk_major: __u32,
    pub disk_minor: __u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_zoned {
    pub max_open_zones: __u32,
    pub max_active_zones: __u32,
    pub max_zone_append_sectors: __u32,
    pub reserved: [__u8; 20usize],
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_dma_align {
    pub alignment: __u32,
    pub pad: [__u8; 4usize],
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_segment {
    pub seg_boundary_mask: __u64,
    pub max_segment_size: __u32,
    pub max_segments: __u16,
    pub pad: [__u8; 2usize],
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_params {
    pub len: __u32,
    pub types: __u32,
    pub basic: ublk_param_basic,
    pub discard: ublk_param_discard,
    pub devt: ublk_param_devt,
    pub zoned: ublk_param_zoned,
    pub dma: ublk_param_dma_align,
    pub seg: ublk_param_segment,
}
pub const UBLK_U_CMD_GET_QUEUE_AFFINITY: libc::c_uint = 2149610753;
pub const UBLK_U_CMD_GET_DEV_INFO: libc::c_uint = 2149610754;
pub const UBLK_U_CMD_ADD_DEV: libc::c_uint = 3223352580;
pub const UBLK_U_CMD_DEL_DEV: libc::c_uint = 3223352581;
pub const UBLK_U_CMD_START_DEV: libc::c_uint = 3223352582;
pub const UBLK_U_CMD_STOP_DEV: libc::c_uint = 3223352583;
pub const UBLK_U_CMD_SET_PARAMS: libc::c_uint = 3223352584;
pub const UBLK_U_CMD_GET_PARAMS: libc::c_uint = 2149610761;
pub const UBLK_U_CMD_START_USER_RECOVERY: libc::c_uint = 3223352592;
pub const UBLK_U_CMD_END_USER_RECOVERY: libc::c_uint = 3223352593;
pub const UBLK_U_CMD_GET_DEV_INFO2: libc::c_uint = 2149610770;
pub const UBLK_U_CMD_GET_FEATURES: libc::c_uint = 2149610771;
pub const UBLK_U_IO_FETCH_REQ: libc::c_uint = 3222304032;
pub const UBLK_U_IO_COMMIT_AND_FETCH_REQ: libc::c_uint = 3222304033;
pub const UBLK_U_IO_NEED_GET_DATA: libc::c_uint = 3222304034;
pub const UBLK_U_CMD_DEL_DEV_ASYNC: libc::c_uint = 2149610772;
pub const UBLK_U_CMD_UPDATE_SIZE: libc::c_uint = 3223352597;
pub const UBLK_U_CMD_QUIESCE_DEV: libc::c_uint = 3223352598;
pub const UBLK_U_CMD_TRY_STOP_DEV: libc::c_uint = 3223352599;
pub const UBLK_U_CMD_REG_BUF: libc::c_uint = 3223352600;
pub const UBLK_U_CMD_UNREG_BUF: libc::c_uint = 3223352601;
pub const UBLK_U_IO_REGISTER_IO_BUF: libc::c_uint = 3222304035;
pub const UBLK_U_IO_UNREGISTER_IO_BUF: libc::c_uint = 3222304036;
pub const UBLK_U_IO_PREP_IO_CMDS: libc::c_uint = 3222304037;
pub const UBLK_U_IO_COMMIT_IO_CMDS: libc::c_uint = 3222304038;
pub const UBLK_U_IO_FETCH_IO_CMDS: libc::c_uint = 3222304039;

/// As the header's structs are laid out.
const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<blk_zone>() == 64);
    assert!(offset_of!(blk_zone, start) == 0);
    assert!(offset_of!(blk_zone, len) == 8);
    assert!(offset_of!(blk_zone, wp) == 16);
    assert!(offset_of!(blk_zone, type_) == 24);
    assert!(offset_of!(blk_zone, cond) == 25);
    assert!(offset_of!(blk_zone, non_seq) == 26);
    assert!(offset_of!(blk_zone, reset) == 27);
    assert!(offset_of!(blk_zone, resv) == 28);
    assert!(offset_of!(blk_zone, capacity) == 32);
    assert!(offset_of!(blk_zone, reserved) == 40);
    assert!(size_of::<blk_zone_range>() == 16);
    assert!(offset_of!(blk_zone_range, sector) == 0);
    assert!(offset_of!(blk_zone_range, nr_sectors) == 8);
    assert!(size_of::<ublk_shmem_buf_reg>() == 24);
    assert!(offset_of!(ublk_shmem_buf_reg, addr) == 0);
    assert!(offset_of!(ublk_shmem_buf_reg, len) == 8);
    assert!(offset_of!(ublk_shmem_buf_reg, flags) == 16);
    assert!(offset_of!(ublk_shmem_buf_reg, reserved) == 20);
    assert!(size_of::<ublksrv_ctrl_cmd>() == 32);
    assert!(offset_of!(ublksrv_ctrl_cmd, dev_id) == 0);
    assert!(offset_of!(ublksrv_ctrl_cmd, queue_id) == 4);
    assert!(offset_of!(ublksrv_ctrl_cmd, len) == 6);
    assert!(offset_of!(ublksrv_ctrl_cmd, addr) == 8);
    assert!(offset_of!(ublksrv_ctrl_cmd, data) == 16);
    assert!(offset_of!(ublksrv_ctrl_cmd, dev_path_len) == 24);
    assert!(offset_of!(ublksrv_ctrl_cmd, pad) == 26);
    assert!(offset_of!(ublksrv_ctrl_cmd, reserved) == 28);
    assert!(size_of::<ublksrv_ctrl_dev_info>() == 64);
    assert!(offset_of!(ublksrv_ctrl_dev_info, nr_hw_queues) == 0);
    assert!(offset_of!(ublksrv_ctrl_dev_info, queue_depth) == 2);
    assert!(offset_of!(ublksrv_ctrl_dev_info, state) == 4);
    assert!(offset_of!(ublksrv_ctrl_dev_info, pad0) == 6);
    assert!(offset_of!(ublksrv_ctrl_dev_info, max_io_buf_bytes) == 8);
    assert!(offset_of!(ublksrv_ctrl_dev_info, dev_id) == 12);
    assert!(offset_of!(ublksrv_ctrl_dev_info, ublksrv_pid) == 16);
    assert!(offset_of!(ublksrv_ctrl_dev_info, pad1) == 20);
    assert!(offset_of!(ublksrv_ctrl_dev_info, flags) == 24);
    assert!(offset_of!(ublksrv_ctrl_dev_info, ublksrv_flags) == 32);
    assert!(offset_of!(ublksrv_ctrl_dev_info, owner_uid) == 40);
    assert!(offset_of!(ublksrv_ctrl_dev_info, owner_gid) == 44);
    assert!(offset_of!(ublksrv_ctrl_dev_info, reserved1) == 48);
    assert!(offset_of!(ublksrv_ctrl_dev_info, reserved2) == 56);
    assert!(size_of::<ublksrv_io_desc>() == 24);
    assert!(offset_of!(ublksrv_io_desc, op_flags) == 0);
    assert!(offset_of!(ublksrv_io_desc, nr_sectors) == 4);
    assert!(offset_of!(ublksrv_io_desc, start_sector) == 8);
    assert!(offset_of!(ublksrv_io_desc, addr) == 16);
    assert!(size_of::<ublk_auto_buf_reg>() == 8);
    assert!(offset_of!(ublk_auto_buf_reg, index) == 0);
    assert!(offset_of!(ublk_auto_buf_reg, flags) == 2);
    assert!(offset_of!(ublk_auto_buf_reg, reserved0) == 3);
    assert!(offset_of!(ublk_auto_buf_reg, reserved1) == 4);
    assert!(size_of::<ublksrv_io_cmd>() == 16);
    assert!(offset_of!(ublksrv_io_cmd, q_id) == 0);
    assert!(offset_of!(ublksrv_io_cmd, tag) == 2);
    assert!(offset_of!(ublksrv_io_cmd, result) == 4);
    assert!(offset_of!(ublksrv_io_cmd, addr) == 8);
    assert!(size_of::<ublk_elem_header>() == 8);
    assert!(offset_of!(ublk_elem_header, tag) == 0);
    assert!(offset_of!(ublk_elem_header, buf_index) == 2);
    assert!(offset_of!(ublk_elem_header, result) == 4);
    assert!(size_of::<ublk_batch_io>() == 16);
    assert!(offset_of!(ublk_batch_io, q_id) == 0);
    assert!(offset_of!(ublk_batch_io, flags) == 2);
    assert!(offset_of!(ublk_batch_io, nr_elem) == 4);
    assert!(offset_of!(ublk_batch_io, elem_bytes) == 6);
    assert!(offset_of!(ublk_batch_io, reserved) == 7);
    assert!(offset_of!(ublk_batch_io, reserved2) == 8);
    assert!(size_of::<ublk_param_basic>() == 32);
    assert!(offset_of!(ublk_param_basic, attrs) == 0);
    assert!(offset_of!(ublk_param_basic, logical_bs_shift) == 4);
    assert!(offset_of!(ublk_param_basic, physical_bs_shift) == 5);
    assert!(offset_of!(ublk_param_basic, io_opt_shift) == 6);
    assert!(offset_of!(ublk_param_basic, io_min_shift) == 7);
    assert!(offset_of!(ublk_param_basic, max_sectors) == 8);
    assert!(offset_of!(ublk_param_basic, chunk_sectors) == 12);
    assert!(offset_of!(ublk_param_basic, dev_sectors) == 16);
    assert!(offset_of!(ublk_param_basic, virt_boundary_mask) == 24);
    assert!(size_of::<ublk_param_discard>() == 20);
    assert!(offset_of!(ublk_param_discard, discard_alignment) == 0);
    assert!(offset_of!(ublk_param_discard, discard_granularity) == 4);
    assert!(offset_of!(ublk_param_discard, max_discard_sectors) == 8);
    assert!(offset_of!(ublk_param_discard, max_write_zeroes_sectors) == 12);
    assert!(offset_of!(ublk_param_discard, max_discard_segments) == 16);
    assert!(offset_of!(ublk_param_discard, reserved0) == 18);
    assert!(size_of::<ublk_param_devt>() == 16);
    assert!(offset_of!(ublk_param_devt, char_major) == 0);
    assert!(offset_of!(ublk_param_devt, char_minor) == 4);
    assert!(offset_of!(ublk_param_devt, disk_major) == 8);
    assert!(offset_of!(ublk_param_devt, disk_minor) == 12);
    assert!(size_of::<ublk_param_zoned>() == 32);
    assert!(offset_of!(ublk_param_zoned, max_open_zones) == 0);
    assert!(offset_of!(ublk_param_zoned, max_active_zones) == 4);
    assert!(offset_of!(ublk_param_zoned, max_zone_append_sectors) == 8);
    assert!(offset_of!(ublk_param_zoned, reserved) == 12);
    assert!(size_of::<ublk_param_dma_align>() == 8);
    assert!(offset_of!(ublk_param_dma_align, alignment) == 0);
    assert!(offset_of!(ublk_param_dma_align, pad) == 4);
    assert!(size_of::<ublk_param_segment>() == 16);
    assert!(offset_of!(ublk_param_segment, seg_boundary_mask) == 0);
    assert!(offset_of!(ublk_param_segment, max_segment_size) == 8);
    assert!(offset_of!(ublk_param_segment, max_segments) == 12);
    assert!(offset_of!(ublk_param_segment, pad) == 14);
    assert!(size_of::<ublk_params>() == 136);
    assert!(offset_of!(ublk_params, len) == 0);
    assert!(offset_of!(ublk_params, types) == 4);
    assert!(offset_of!(ublk_params, basic) == 8);
    assert!(offset_of!(ublk_params, discard) == 40);
    assert!(offset_of!(ublk_params, devt) == 60);
    assert!(offset_of!(ublk_params, zoned) == 76);
    assert!(offset_of!(ublk_params, dma) == 108);
    assert!(offset_of!(ublk_params, seg) == 120);
};
