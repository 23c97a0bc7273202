//! A device's parameters: what the block layer is told of it, and whether a device found is shaped
//! like its volume.

use libublk::sys;
use quarry_objfmt::SECTOR_SIZE;

use super::{DISCARD_BYTES_MAX, DeviceSpec, IO_BYTES_MAX, UblkError};

/// A device's physical block: what the cache device and every file system are laid out in, 4 KiB.
const PHYSICAL_BLOCK_SHIFT: u8 = 12;

/// Preferred size of an I/O: a frame of a chunk, 64 KiB.
const IO_OPT_SHIFT: u8 = 16;

/// Mask of a request's pages' addresses: aligned to 512 bytes they suit direct I/O on any cache
/// device. Left out, the kernel would take 3.
const DMA_ALIGNMENT: u32 = 511;

/// The parameters of a device that is to be made.
pub(super) fn of_spec(spec: &DeviceSpec) -> sys::ublk_params {
    let read_only = if spec.read_only {
        sys::UBLK_ATTR_READ_ONLY
    } else {
        0
    };
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC
            | sys::UBLK_PARAM_TYPE_DISCARD
            | sys::UBLK_PARAM_TYPE_DMA_ALIGN,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA | read_only,
            logical_bs_shift: logical_shift(spec.sector_size),
            physical_bs_shift: PHYSICAL_BLOCK_SHIFT,
            io_opt_shift: IO_OPT_SHIFT,
            io_min_shift: PHYSICAL_BLOCK_SHIFT,
            max_sectors: IO_BYTES_MAX / SECTOR_SIZE,
            dev_sectors: spec.size.get(),
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_granularity: 1 << PHYSICAL_BLOCK_SHIFT,
            max_discard_sectors: DISCARD_BYTES_MAX / SECTOR_SIZE,
            max_write_zeroes_sectors: DISCARD_BYTES_MAX / SECTOR_SIZE,
            max_discard_segments: 1,
            ..Default::default()
        },
        dma: sys::ublk_param_dma_align {
            alignment: DMA_ALIGNMENT,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Whether the device with these parameters can be `spec`'s. One that is smaller can: a volume grows
/// before its device does.
pub(super) fn check(
    id: u32,
    params: &sys::ublk_params,
    spec: &DeviceSpec,
) -> Result<(), UblkError> {
    let read_only = |attrs: u32| u64::from(attrs & sys::UBLK_ATTR_READ_ONLY != 0);
    let wanted = of_spec(spec);
    let shape = |what, device, volume| UblkError::Shape {
        id,
        what,
        device,
        volume,
    };
    let (device, volume) = (params.basic.dev_sectors, wanted.basic.dev_sectors);
    if device > volume {
        return Err(shape("size in sectors", device, volume));
    }
    for (what, device, volume) in [
        (
            "block size shift",
            params.basic.logical_bs_shift.into(),
            wanted.basic.logical_bs_shift.into(),
        ),
        (
            "read-only state",
            read_only(params.basic.attrs),
            read_only(wanted.basic.attrs),
        ),
    ] {
        if device != volume {
            return Err(shape(what, device, volume));
        }
    }
    Ok(())
}

/// log2 of a logical block.
fn logical_shift(sector_size: u32) -> u8 {
    assert!(
        matches!(sector_size, 512 | 4096),
        "a volume's logical block is 512 or 4096 bytes"
    );
    if sector_size == 512 { 9 } else { 12 }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::Sectors;

    use super::*;

    #[test]
    fn params_of_a_spec_pass_its_check() {
        check(0, &of_spec(&DeviceSpec::example()), &DeviceSpec::example()).unwrap();
    }

    #[test]
    fn params_of_a_smaller_device_pass_the_check_of_its_grown_volume() {
        let grown = DeviceSpec {
            size: Sectors::new(4096),
            ..DeviceSpec::example()
        };
        check(0, &of_spec(&DeviceSpec::example()), &grown).unwrap();
    }

    #[test]
    fn params_of_another_shape_are_refused() {
        let params = of_spec(&DeviceSpec::example());
        for other in [
            DeviceSpec {
                size: Sectors::new(2040),
                ..DeviceSpec::example()
            },
            DeviceSpec {
                sector_size: 512,
                ..DeviceSpec::example()
            },
            DeviceSpec {
                read_only: true,
                ..DeviceSpec::example()
            },
        ] {
            assert!(matches!(
                check(0, &params, &other),
                Err(UblkError::Shape { .. })
            ));
        }
    }
}
