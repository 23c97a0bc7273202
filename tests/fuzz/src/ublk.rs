//! What the kernel asks of a ublk device.

use libublk::sys::{self, ublksrv_io_desc};
use quarry_gateway::reactor::ublk_queue::{Data, IoRequest};
use quarry_gateway::ublk::IO_BYTES_MAX;
use quarry_objfmt::SECTOR_SIZE;
use quarry_volume::Op;

use crate::mend::padded;

/// A descriptor is refused, or is a request of just its sectors, whose data fit a buffer and whose
/// result is their length.
pub(crate) fn ublk_descriptor(input: &[u8]) {
    let bytes: [u8; 24] = padded(input);
    let (flags, rest) = bytes.split_at(4);
    let (sectors, rest) = rest.split_at(4);
    let descriptor = ublksrv_io_desc {
        op_flags: u32::from_le_bytes(padded(flags)),
        nr_sectors: u32::from_le_bytes(padded(sectors)),
        start_sector: u64::from_le_bytes(padded(rest)),
        addr: u64::from_le_bytes(padded(&rest[8..])),
    };
    let sectors = u128::from(descriptor.nr_sectors);
    let end = u128::from(descriptor.start_sector) + sectors;
    let fits = end <= u128::from(u64::MAX);
    let request = match IoRequest::parse(&descriptor) {
        Ok(request) => request,
        Err(errno) => {
            assert!(errno > 0);
            let small = (1..=u128::from(IO_BYTES_MAX / SECTOR_SIZE)).contains(&sectors);
            let reads = descriptor.op_flags & 0xff == sys::UBLK_IO_OP_READ;
            return assert!(!(reads && small && fits), "{descriptor:?} could be served");
        }
    };
    match request.data {
        Data::None => {
            assert!(!matches!(request.op, Op::Read | Op::Write { .. }));
            assert_eq!(request.result(), 0);
        }
        Data::Bytes { len, .. } => {
            assert!(matches!(request.op, Op::Read | Op::Write { .. }));
            assert!(len > 0 && len <= IO_BYTES_MAX);
            assert_eq!(u128::from(len), sectors * u128::from(SECTOR_SIZE));
            assert_eq!(i64::from(request.result()), i64::from(len));
        }
    }
    if request.op != Op::Flush {
        assert!(fits);
        assert_eq!(request.range.start.get(), descriptor.start_sector);
        assert_eq!(u128::from(request.range.end.get()), end);
    }
}
